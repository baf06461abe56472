"""Samples by their place in the order: read by offset, checked against the index, replaced where they
cannot be used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipelines.errors import DataError, SampleError, ShardError
from data_pipelines.images import MAX_IMAGE_PIXELS, Pixels, decode
from data_pipelines.index import IMAGE_EXTENSIONS, ShardIndex, Span, decode_index, payload_digest
from data_pipelines.order import Order, OrderParams, sample_seed
from data_pipelines.rights import EMPTY, RemovalList, removed_samples, rights_of_json, shard_urls
from data_pipelines.sources import (
    LocalFile,
    RemoteFile,
    ShardFile,
    ensure_index,
    ensure_summary,
    expand_all,
    find_index,
    is_pipe,
    is_remote,
    shard_name,
    size_bytes,
)
from data_pipelines.tar import checksum

MAX_OPEN_SHARDS = 128
SUBSTITUTES_IN_SHARD = 8
SUBSTITUTES = 64
MAX_CLASS_INDEX = 2**31 - 1
"""Evaluations keep classes as 32-bit numbers."""
MIN_DRAWS_FOR_RATE = 1000
"""The rate of bad samples is taken over at least so many draws: the first bad one must not end a run."""


@dataclass(frozen=True)
class ShardEntry:
    """One line of a manifest."""

    url: str
    name: str
    num_samples: int
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Source:
    """Shards that are drawn from together."""

    shards: tuple[ShardEntry, ...]
    weight: float = 1.0


class BadSample(NamedTuple):
    """Shard, key and reason are a line of quarantine.jsonl. `key` is None where a shard is damaged and nobody
    knows which keys it held."""

    shard: str
    key: str | None
    reason: str
    removed: bool = False
    """Left out because a removal list says so, not because it is broken."""


@dataclass(frozen=True)
class Manifest:
    """All shards of a data set, in a fixed order, with the number of samples of each."""

    sources: tuple[Source, ...]
    damage: tuple[BadSample, ...] = ()
    """What is known to be broken before any sample is read."""

    @cached_property
    def shards(self) -> tuple[ShardEntry, ...]:
        return tuple(shard for source in self.sources for shard in source.shards)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the names and contents of the shards; where they lie does not matter."""
        listed = [[[shard.name, shard.digest] for shard in source.shards] for source in self.sources]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def order(self, params: OrderParams) -> Order:
        sizes = [[shard.num_samples for shard in source.shards] for source in self.sources]
        return Order(sizes, [source.weight for source in self.sources], params)


class RawSample(NamedTuple):
    """A sample as it is stored."""

    key: str
    """SHARD_FILE_NAME/KEY"""
    image: bytes
    image_digest: bytes
    captions: tuple[str, ...]
    class_index: int
    """From KEY.cls; -1 where there is none."""


class Drawn(NamedTuple):
    """A usable sample at a position of the order."""

    sample: int
    """Position in the data set of the sample that is used."""
    raw: RawSample
    pixels: Pixels
    caption: str
    rng: random.Random
    """For augmentation: the same whenever this sample is drawn in this epoch."""
    bad: tuple[BadSample, ...]
    """What stood here first and could not be used."""


@dataclass(frozen=True)
class ReadOptions:
    """How stored samples are read."""

    caption: str = "txt"
    """the member's ending, or a field of KEY.json"""
    captions: Literal["required", "optional", "ignored"] = "required"
    """What a sample without a caption is: bad, or fine; "ignored" leaves captions unread."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """an image of more (width times height) is bad, told by its header"""
    removals: RemovalList = EMPTY
    """samples that must not be used"""
    cache_dir: Path | None = None
    """for the indexes of read-only and remote sources; None: a folder of the user's"""


def make_manifest(sources: Sequence[tuple[Sequence[str], float]], cache_dir: Path | None = None) -> Manifest:
    """Find and index the shards of each (paths, weight). Missing indexes are made. Raises DataError,
    ShardError."""
    entries = []
    damage: list[BadSample] = []
    for paths, weight in sources:
        urls = expand_all(paths)
        if pipes := [url for url in urls if is_pipe(url)]:
            raise DataError(f"{pipes[0]}: a pipe has no index; only data.train can be one, and alone")
        # Summaries are small reads: many at once where each is a round trip, in turn where they come from
        # a disk.
        workers = 16 if any(is_remote(url) for url in urls) else 1
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda url: _entry(url, cache_dir), urls))
        entries.append(Source(tuple(entry for entry, _ in found), weight))
        damage += [bad for _, bads in found for bad in bads]
    manifest = Manifest(tuple(entries), tuple(damage))
    if not manifest.num_samples:
        raise DataError(f"{', '.join(p for paths, _ in sources for p in paths)}: the shards hold no samples")
    return manifest


def _entry(url: str, cache_dir: Path | None) -> tuple[ShardEntry, list[BadSample]]:
    summary = ensure_summary(url, cache_dir)
    name = shard_name(url)
    size_bytes(url)  # a shard that is missing is the user's mistake; one that shrank shows sample by sample
    damage = [BadSample(name, None, f"byte {item.offset}: {item.reason}") for item in summary.damage]
    return ShardEntry(url, name, summary.num_samples, summary.tar_size, summary.digest), damage


class Reader:
    """Reads stored samples of a manifest. Opens shards when they are first needed; pickles without them."""

    def __init__(
        self,
        manifest: Manifest,
        options: ReadOptions,
        *,
        open_file: Callable[[ShardEntry], ShardFile] | None = None,
        max_open: int = MAX_OPEN_SHARDS,
    ) -> None:
        """open_file: how to open a shard, as a cache does; None: where it lies. max_open: so many shards are
        kept open, and the longest unused is closed first."""
        self.manifest = manifest
        self.options = options
        self._open_file = open_file or open_shard
        self._max_open = max_open
        self._firsts = [0, *accumulate(shard.num_samples for shard in manifest.shards)]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, position in it) of a position in the data set."""
        shard = bisect_right(self._firsts, sample) - 1
        return shard, sample - self._firsts[shard]

    def first_of(self, shard: int) -> int:
        """Position in the data set of the first sample of a shard."""
        return self._firsts[shard]

    def key(self, sample: int) -> str:
        """SHARD_FILE_NAME/KEY. Raises ShardError."""
        shard, position = self.locate(sample)
        entry = self.manifest.shards[shard]
        return f"{entry.name}/{self._index(shard).keys[position]}"

    def read(self, sample: int) -> RawSample:
        """Raises SampleError if it cannot be used as it is stored, RemovedError if it must not be,
        ShardError."""
        shard, position = self.locate(sample)
        opened = self._opened(shard)
        if position in opened.removed:
            raise RemovedError(f"removed: {opened.removed[position]}")
        payloads = _read_members(opened, position)
        index = opened.index
        # The index knows the hash of the image already, and the checksum vouches for the bytes.
        digest_of = partial(index.payload_digest, position)
        return parse_sample(f"{opened.name}/{index.keys[position]}", payloads, self.options, digest_of)

    def members(self, sample: int) -> dict[str, bytes]:
        """Every member of a sample, checked against the index. Raises SampleError, ShardError."""
        shard, position = self.locate(sample)
        opened = self._opened(shard)
        return _read_members(opened, position)

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def _index(self, shard: int) -> ShardIndex:
        return self._opened(shard).index

    def _opened(self, shard: int) -> _OpenShard:
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        while len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        entry = self.manifest.shards[shard]
        index = _index_of(entry, self.options.cache_dir)
        removed = removed_of(entry, index, self.options.removals)
        self._open[shard] = _OpenShard(entry.name, index, removed, lambda: self._open_file(entry))
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


class RemovedError(SampleError):
    """The sample stands on a removal list."""


class _OpenShard:
    """An index, and the file behind it once bytes are asked for."""

    def __init__(
        self, name: str, index: ShardIndex, removed: dict[int, str], open_file: Callable[[], ShardFile]
    ) -> None:
        self.name = name
        self.index = index
        self.removed = removed
        self._open_file = open_file
        self._file: ShardFile | None = None

    def read(self, start: int, end: int) -> bytes:
        if self._file is None:
            self._file = self._open_file()
        data = self._file.read(start, end)
        if len(data) < end - start:
            raise SampleError(f"the shard ends at byte {start + len(data)}, inside this sample")
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def parse_sample(
    key: str,
    payloads: Mapping[str, bytes],
    options: ReadOptions,
    digest_of: Callable[[str], bytes] | None = None,
) -> RawSample:
    """What the members of a sample mean. `digest_of` an extension: its payload's, where an index knows it.

    Raises SampleError if it cannot be used, RemovedError if it must not be.
    """
    extension = _image_extension(payloads)
    image = payloads[extension]
    digest = digest_of(extension) if digest_of else payload_digest(image)
    if options.removals:
        # Shards of other tools carry the URL in KEY.json and have no Parquet file beside them.
        url = rights_of_json(payloads["json"]).get("url") if "json" in payloads else None
        line = options.removals.match(key=key, sha256=digest.hex(), url=url)
        if line is not None:
            raise RemovedError(f"removed: {line}")
    return RawSample(key, image, digest, _captions(payloads, options), _class_index(payloads))


def _image_extension(payloads: Mapping[str, bytes]) -> str:
    for extension in IMAGE_EXTENSIONS:
        if extension in payloads:
            return extension
    raise SampleError(f"no image among its members ({', '.join(payloads)})")


def open_shard(entry: ShardEntry) -> ShardFile:
    """The file of a shard where it lies. Raises ShardError."""
    return RemoteFile(entry.url) if is_remote(entry.url) else LocalFile(entry.url)


def removed_of(entry: ShardEntry, index: ShardIndex, removals: RemovalList) -> dict[int, str]:
    """Positions in a shard that the list removes, by key, image hash and the URLs of the table beside it;
    URLs that stand in KEY.json alone show when a sample is read."""
    if not removals:
        return {}
    urls = None if is_remote(entry.url) else shard_urls(entry.url)
    return removed_samples(removals, index, shard_name=entry.name, urls=urls)


def _index_of(entry: ShardEntry, cache_dir: Path | None) -> ShardIndex:
    found = find_index(entry.url, cache_dir)
    index = ensure_index(entry.url, cache_dir) if found is None else decode_index(found[1], name=found[0])
    if index.digest != entry.digest:
        raise ShardError(
            f"{entry.url}: its index changed while it was in use; do not rebuild shards under a run"
        )
    return index


def _read_members(opened: _OpenShard, position: int) -> dict[str, bytes]:
    extent = opened.index.extent(position)
    if extent is None:
        return {ext: _read_member(opened, ext, span) for ext, span in opened.index.members(position).items()}
    start, end, expected = extent
    data = opened.read(start, end)
    if checksum(data) != expected:
        raise SampleError("its bytes are not those that the index was made of")
    return opened.index.payloads(position, data, start)


def _read_member(opened: _OpenShard, extension: str, span: Span) -> bytes:
    data = opened.read(span.header_offset, span.offset + span.size + -span.size % 512)
    if checksum(data) != span.checksum:
        raise SampleError(f"the bytes of its .{extension} are not those that the index was made of")
    start = span.offset - span.header_offset
    return data[start : start + span.size]


def _captions(payloads: Mapping[str, bytes], options: ReadOptions) -> tuple[str, ...]:
    """All captions of a sample. Raises SampleError for none where one is required."""
    wanted = options.caption
    found = () if options.captions == "ignored" else _stored_captions(payloads, wanted)
    if not found and options.captions != "required":
        return ()
    if not found or not all(map(str.strip, found)):
        raise SampleError(
            f"no caption: neither .{wanted} nor a field of .json gives one" if not found else "empty caption"
        )
    return found


def _stored_captions(payloads: Mapping[str, bytes], wanted: str) -> tuple[str, ...]:
    stored = payloads.get("json", b"")
    # Parsing JSON costs more than reading the sample, so it is done only where it can matter.
    several = b'"captions"' in stored
    if wanted in payloads and not several:
        return (_text(payloads[wanted], wanted),)
    if stored:
        record = _json_object(stored)
        names = ("captions", "caption") if wanted == "txt" else (wanted, "captions")
        for name in names:
            match record.get(name):
                case str(caption):
                    return (caption,)
                case list(captions) if captions and all(isinstance(item, str) for item in captions):
                    return tuple(captions)
    return (_text(payloads[wanted], wanted),) if wanted in payloads else ()


def _json_object(data: bytes) -> dict[str, object]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise SampleError(f".json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise SampleError(".json is no object")
    return record


def _text(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f".{extension} is not UTF-8 text") from error


def _class_index(payloads: Mapping[str, bytes]) -> int:
    if "cls" not in payloads:
        return -1
    try:
        index = int(payloads["cls"])
    except ValueError as error:
        raise SampleError(f".cls is no class index: {payloads['cls'][:20]!r}") from error
    if abs(index) > MAX_CLASS_INDEX:
        raise SampleError(f".cls is no class index: {payloads['cls'][:20]!r}")
    return index


class Drawer:
    """What stands at (epoch, sample) of the order, with a bad sample replaced, always by the same one."""

    def __init__(self, reader: Reader, *, seed: int) -> None:
        self.reader = reader
        self._seed = seed

    def draw(self, epoch: int, sample: int, source: int = 0) -> Drawn:
        """Raises DataError if nothing usable is found in SUBSTITUTES attempts."""
        bad: list[BadSample] = []
        for candidate in self._candidates(epoch, sample, source):
            rng = random.Random(sample_seed(self._seed, epoch, candidate))
            try:
                raw = self.reader.read(candidate)
                pixels = decode(raw.image, max_pixels=self.reader.options.max_image_pixels)
            except (SampleError, ShardError) as error:
                bad.append(self._describe(candidate, error))
                continue
            caption = raw.captions[int(rng.random() * len(raw.captions))]
            return Drawn(candidate, raw, pixels, caption, rng, tuple(bad))
        raise DataError(
            f"{bad[0].shard}/{bad[0].key}: {bad[0].reason}; no usable sample was found in its place "
            f"in {len(bad)} attempts: run `clipstack data verify`"
        )

    def _candidates(self, epoch: int, sample: int, source: int) -> Iterator[int]:
        """The sample itself, then others drawn from its shard, then from its source."""
        yield sample
        shard, _ = self.reader.locate(sample)
        rng = random.Random(sample_seed(self._seed, epoch, -1 - sample))
        first, size = self.reader.first_of(shard), self.reader.manifest.shards[shard].num_samples
        for _ in range(SUBSTITUTES_IN_SHARD):
            yield first + int(rng.random() * size)
        low, high = self._bounds(source)
        for _ in range(SUBSTITUTES - SUBSTITUTES_IN_SHARD):
            yield low + int(rng.random() * (high - low))

    def _bounds(self, source: int) -> tuple[int, int]:
        shards = [len(one.shards) for one in self.reader.manifest.sources]
        first = sum(shards[:source])
        return self.reader.first_of(first), self.reader.first_of(first + shards[source])

    def _describe(self, sample: int, error: SampleError | ShardError) -> BadSample:
        shard, key = describe_place(self.reader, sample)
        return BadSample(shard, key, str(error), removed=isinstance(error, RemovedError))


def describe_place(reader: Reader, sample: int) -> tuple[str, str]:
    """(shard file name, key) of a sample; where even the index cannot be read the key is its position, as
    `#12`."""
    shard, position = reader.locate(sample)
    name = reader.manifest.shards[shard].name
    try:
        return name, reader.key(sample).removeprefix(name + "/")
    except ShardError:
        return name, f"#{position}"


@dataclass
class BadRate:
    """Counts draws and bad ones, and stops a run that has too many."""

    limit: float
    draws: int = 0
    bad: int = 0
    last: BadSample | None = field(default=None, repr=False)

    def count(self, draws: int, bad: Iterable[BadSample]) -> None:
        """Raises DataError above the limit. Removed samples are not bad."""
        self.draws += draws
        for sample in bad:
            if not sample.removed:
                self.bad += 1
                self.last = sample
        if self.last is not None and self.bad > self.limit * max(self.draws, MIN_DRAWS_FOR_RATE):
            last = f"{self.last.shard}/{self.last.key} ({self.last.reason})"
            raise DataError(
                f"data.max_bad_fraction = {self.limit}: {self.bad} of {self.draws} samples "
                f"could not be used, the last of them {last}; see quarantine.jsonl, "
                "or run `clipstack data verify` on the shards"
            )


class Quarantine:
    """quarantine.jsonl: each bad sample once, whatever the ranks, epochs and restarts that meet it.

    Lines that the disk refuses are shown on stderr and wait in memory: a full disk is no reason to stop
    training, and nothing is lost unseen.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: set[tuple[str, str | None, str]] = set()
        self._read_to = 0
        self._pending: dict[tuple[str, str | None, str], BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Append those that are not there yet. Safe for several processes."""
        if self._path is None:
            return
        new = {
            _identity(sample): sample
            for sample in samples
            if _identity(sample) not in self._seen and _identity(sample) not in self._pending
        }
        self._pending |= new
        if new:
            error = self.write_pending()
            if error is not None:
                _show_unwritten(self._path, error, new.values())

    def write_pending(self) -> OSError | None:
        """Write the lines that wait; why they have to wait on, or None."""
        if self._path is None or not self._pending:
            return None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up(file.fileno())
                lines = [_line(bad) for name, bad in self._pending.items() if name not in self._seen]
                _append_whole(file.fileno(), b"".join(lines))
        except OSError as error:
            return error
        self._seen |= self._pending.keys()
        self._pending.clear()
        return None

    def _catch_up(self, fd: int) -> None:
        """Learn what other processes, or a run before this one, have written."""
        data = os.pread(fd, os.fstat(fd).st_size - self._read_to, self._read_to)
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # a torn last line of a run that was killed
            os.ftruncate(fd, self._read_to + len(whole))
        self._read_to += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self._seen.add(
                (record["shard"], record["key"], record["reason"] if record["key"] is None else "")
            )


def _append_whole(fd: int, data: bytes) -> None:
    """Append all of `data`, or nothing. Raises OSError."""
    size = os.fstat(fd).st_size
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        os.ftruncate(fd, size)
        raise


def _show_unwritten(path: Path, error: OSError, samples: Iterable[BadSample]) -> None:
    print(f"{path}: cannot be written ({error.strerror}); these lines wait until it can:", file=sys.stderr)
    for sample in samples:
        print(_line(sample).decode().rstrip(), file=sys.stderr, flush=True)


def _identity(sample: BadSample) -> tuple[str, str | None, str]:
    # Several damages of one shard have no key to tell them apart.
    return sample.shard, sample.key, sample.reason if sample.key is None else ""


def _line(sample: BadSample) -> bytes:
    record = {"shard": sample.shard, "key": sample.key, "reason": sample.reason}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def order_state(manifest: Manifest, params: OrderParams) -> dict[str, object]:
    """What must stay the same for a position to mean the same sample: JSON-able."""
    return {
        "manifest": manifest.digest,
        "weights": [source.weight for source in manifest.sources],
        **asdict(params),
    }
