"""What is wrong with shards, sample by sample, and new shards of what can be saved.

Structure is read without an index: headers, end mark, keys, members. An index adds certainty about every
byte. Then images are decoded. Where no hash vouches for a JPEG's bytes, its decoder must not complain of
anything at all, since it would otherwise paint over a hole in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_pipelines.errors import DataError, SampleError, ShardError
from data_pipelines.images import MAX_IMAGE_PIXELS, decode
from data_pipelines.index import Sample
from data_pipelines.index.finding import find_index
from data_pipelines.index.format import decode_index
from data_pipelines.index.indexing import IndexBuilder
from data_pipelines.index.shard_index import ShardIndex, Span, image_extension, payload_digest, split_name
from data_pipelines.index.writer import ShardWriter
from data_pipelines.inputs.shards import shard_columns
from data_pipelines.parallel import map_processes
from data_pipelines.progress import Progress
from data_pipelines.sources import LocalFile
from data_pipelines.table import (
    Row,
    describe,
    read_table,
    sample_caption,
    table_path,
    write_table,
)
from data_pipelines.tar import Damage, walk

Kind = Literal[
    "structure",  # a broken header, a zeroed block, a cut archive
    "index",  # the index itself, or index and archive disagree
    "payload",  # bytes that are not those the index or the table knows
    "image",  # cannot be decoded, or has too many pixels
    "duplicate-key",
    "missing-member",  # no image, or nothing to pair it with
    "table",  # the Parquet file disagrees with the shard
]

_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Finding:
    shard: str
    kind: Kind
    detail: str
    key: str | None = None
    offset: int | None = None
    """Bytes from the start of the archive."""


@dataclass(frozen=True)
class VerifyOptions:
    decode_every: int = 1
    """Decode every n-th image; 0: none."""
    max_pixels: int = MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class ShardCheck:
    shard: str
    samples: int
    """Keys that were found in the archive or its index."""
    sound: int
    """Of them, those whose bytes are all there and all right: what a repair saves."""
    findings: tuple[Finding, ...]
    repaired: int | None = None


@dataclass
class _Found:
    """One key: its members and whether anything is wrong with it."""

    members: dict[str, bytes]
    vouched: set[str]
    """Members whose bytes the index confirms."""
    sound: bool = True


def check_shard(tar: Path, options: VerifyOptions, repair: Path | None = None) -> ShardCheck:
    """Everything that is wrong with one local shard; with `repair`, its sound samples go to a new shard of
    this path.

    Holds the shard's members in memory. Raises ShardError where it cannot be read at all.
    """
    findings: list[Finding] = []

    def report(kind: Kind, detail: str, key: str | None = None, offset: int | None = None) -> None:
        findings.append(Finding(str(tar), kind, detail, key, offset))

    index = _load_index(tar, report)
    samples, built = _read_archive(tar, report)
    if index is not None:
        _compare_with_index(tar, index, built, samples, report)
    _check_members(samples, report)
    _decode_images(samples, options, report)
    _check_table(tar, samples, report)
    if not samples and not findings:
        report("structure", "no samples in this archive")
    sound = {key: found.members for key, found in samples.items() if found.sound}
    repaired = None if repair is None else _write_sound(tar, repair, sound)
    return ShardCheck(str(tar), len(samples), len(sound), tuple(findings), repaired)


_Report = Callable[..., None]


def _load_index(tar: Path, report: _Report) -> ShardIndex | None:
    found = find_index(str(tar))
    if found is None:
        return None
    try:
        return decode_index(found[1], name=found[0])
    except ShardError as error:
        report("index", str(error))
        return None


def _read_archive(tar: Path, report: _Report) -> tuple[dict[str, _Found], ShardIndex]:
    """Samples by key as the archive's own headers tell, and the index that it would get."""
    samples: dict[str, _Found] = {}
    builder = IndexBuilder()
    repeated: dict[str, int] = {}
    previous: str | None = None
    try:
        with open(tar, "rb", buffering=2**20) as stream:
            for item in walk(stream):
                if isinstance(item, Damage):
                    report("structure", item.reason, offset=item.offset)
                    previous = None
                    continue
                split = split_name(item.name)
                if split is None:
                    continue
                builder.add(item)
                key, extension = split
                found = samples.setdefault(key, _Found({}, set()))
                # Readers group neighbours: a key that comes back after another one heads a second sample.
                if extension in found.members or (found.members and previous != key):
                    repeated.setdefault(key, item.header_offset)
                found.members.setdefault(extension, item.payload)
                previous = key
        size = tar.stat().st_size
    except OSError as error:
        raise ShardError(f"{tar}: cannot be read: {error.strerror}") from error
    for key, offset in repeated.items():
        report("duplicate-key", "comes more than once; only the first is used", key, offset)
    return samples, builder.finish(size)


def _compare_with_index(
    tar: Path, index: ShardIndex, built: ShardIndex, samples: dict[str, _Found], report: _Report
) -> None:
    """Notes members whose bytes or place are not the index's, and brings back those whose header alone is
    lost."""
    if index.tar_size != built.tar_size:
        report("index", f"{built.tar_size} bytes long, its index says {index.tar_size}")
    for damage in index.damage:
        report("index", f"was damaged when it was indexed: {damage.reason}", offset=damage.offset)
    file = LocalFile(tar)
    try:
        for position, key in enumerate(index.keys):
            if index.position(key) != position:
                continue  # a repeated key: the archive's own walk has told
            found = samples.setdefault(key, _Found({}, set()))
            there = built.position(key)
            places = {} if there is None else built.members(there)
            for extension, span in index.members(position).items():
                _compare_member(file, key, extension, span, places.get(extension), found, report)
    finally:
        file.close()
    known = set(index.keys)
    for key, found in samples.items():
        if key not in known:
            report("index", "is in the archive, but not in its index", key)
            found.sound = False


def _compare_member(
    file: LocalFile, key: str, extension: str, span: Span, place: Span | None, found: _Found, report: _Report
) -> None:
    """`span` is where the index says that the member is, `place` where the archive has it."""
    payload = found.members.get(extension)
    if payload is None:
        payload = file.read(span.offset, span.offset + span.size)
        if payload_digest(payload) == span.digest:
            detail = f"the header of .{extension} is lost, its bytes are not"
            report("structure", detail, key, span.header_offset)
        else:
            report("payload", f".{extension} is lost", key, span.header_offset)
            found.sound = False
            return
        found.members[extension] = payload
    elif payload_digest(payload) != span.digest:
        report("payload", f".{extension} has other bytes than its index knows", key, span.offset)
        found.sound = False
        return
    elif place is not None and place.header_offset != span.header_offset:
        detail = f".{extension} lies at another place than its index knows"
        report("index", detail, key, place.header_offset)
    elif place is not None and place.checksum != span.checksum:
        # Its bytes are right, yet readers that check whole blocks will not take it.
        report("structure", f"the header or padding of .{extension} has changed", key, span.header_offset)
    found.vouched.add(extension)


def _check_members(samples: Mapping[str, _Found], report: _Report) -> None:
    """A sample needs an image and a partner for it; where most samples have a caption file, so must each."""
    with_text = sum("txt" in found.members for found in samples.values())
    expects_text = 2 * with_text > len(samples)
    for key, found in samples.items():
        extensions = ", ".join(f".{extension}" for extension in found.members) or "nothing"
        if image_extension(found.members) is None:
            report("missing-member", f"no image (it has {extensions})", key)
            found.sound = False
            continue
        caption = sample_caption(found.members)
        if caption is None and ("cls" not in found.members or expects_text):
            report("missing-member", f"no caption (it has {extensions})", key)
            found.sound = False


def _decode_images(samples: Mapping[str, _Found], options: VerifyOptions, report: _Report) -> None:
    if not options.decode_every:
        return
    for number, (key, found) in enumerate(samples.items()):
        extension = image_extension(found.members)
        if number % options.decode_every or extension is None:
            continue
        try:
            decode_strictly(
                found.members[extension], vouched=extension in found.vouched, max_pixels=options.max_pixels
            )
        except SampleError as error:
            report("image", f".{extension}: {error}", key)
            found.sound = False


def decode_strictly(data: bytes, *, vouched: bool, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Decode as training does; unless a hash vouches for the bytes, what a JPEG decoder only warns of counts
    too.

    Raises SampleError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        decode(data, max_pixels=max_pixels)
    if vouched or not data.startswith(_JPEG):
        return
    import simplejpeg

    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        raise SampleError(f"the JPEG decoder complains: {error}") from error


def _check_table(tar: Path, samples: Mapping[str, _Found], report: _Report) -> None:
    """Keys and image hashes of our own table beside the archive, if there is one."""
    try:
        table = read_table(tar)
    except ShardError as error:
        report("table", f"{table_path(tar).name}: {error}")
        return
    if table is None:
        return
    hashes = dict(zip(table["key"].to_list(), table["sha256"].to_list(), strict=True))
    if len(hashes) != table.height:
        report("table", f"{table_path(tar).name}: a key comes more than once")
    for key in samples.keys() - hashes.keys():
        report("table", f"{table_path(tar).name} has no row for it", key)
    for key, digest in hashes.items():
        found = samples.get(key)
        extension = None if found is None else image_extension(found.members)
        if found is None:
            report("table", f"{table_path(tar).name} has a row, the archive has no such sample", key)
        elif (
            extension is not None
            # What the index confirms, or has already reported, is not reported again.
            and found.sound
            and extension not in found.vouched
            and not digest.startswith(payload_digest(found.members[extension]).hex())
        ):
            report("payload", f".{extension} has other bytes than its table knows", key)
            found.sound = False


def _write_sound(tar: Path, target: Path, sound: Mapping[str, Mapping[str, bytes]]) -> int:
    """A shard, index and table of the sound samples; none where there is not one. Returns how many."""
    if not sound:
        return 0
    try:
        columns = shard_columns(tar)
    except ShardError:
        columns = {}  # a table that cannot be read was reported; what it alone knew is lost
    rows: list[Row] = []
    with ShardWriter(target) as writer:
        for key, members in sound.items():
            sample = Sample(key, members)
            carried = columns.get(key, {})
            try:
                row = describe(sample, carried=carried, origin=carried.get("origin") or f"{tar.name}/{key}")
            except SampleError:
                continue  # only where images were not all decoded before
            writer.add(sample)
            rows.append(row)
        if rows:
            write_table(rows, table_path(target))
            writer.commit()
    return len(rows)


def _check(pair: tuple[Path, Path | None], *, options: VerifyOptions) -> ShardCheck:
    tar, repair = pair
    try:
        return check_shard(tar, options, repair)
    except ShardError as error:
        return ShardCheck(str(tar), 0, 0, (Finding(str(tar), "structure", str(error)),))


def verify(
    tars: Sequence[Path], options: VerifyOptions, *, repair: Path | None = None, processes: int = 1
) -> list[ShardCheck]:
    """Check shards; with `repair`, write what is sound of each into that folder under the same name.

    What is wrong with a shard is a finding. Raises DataError for a folder that cannot be written.
    """
    targets = [None if repair is None else repair / tar.name for tar in tars]
    if repair is not None:
        try:
            repair.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--repair {repair}: cannot be written: {error.strerror}") from error
    out: list[ShardCheck] = []
    with Progress("verify", len(tars), unit="shards") as progress:
        work = list(zip(tars, targets, strict=True))
        for check in map_processes(partial(_check, options=options), work, processes=processes):
            out.append(check)
            progress.advance()
    return out


def summary(checks: Sequence[ShardCheck]) -> dict[str, Any]:
    """As JSON: totals, and every finding."""
    findings = [finding for check in checks for finding in check.findings]
    out: dict[str, Any] = {
        "shards": len(checks),
        "samples": sum(check.samples for check in checks),
        "sound": sum(check.sound for check in checks),
        "damaged_shards": sum(bool(check.findings) for check in checks),
        "findings": [asdict(finding) for finding in findings],
    }
    if any(check.repaired is not None for check in checks):
        out["repaired"] = sum(check.repaired or 0 for check in checks)
    return out
