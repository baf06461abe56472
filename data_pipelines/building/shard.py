"""One shard: items to a tar with index and table, what was rejected and what was removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines.building.plan import BuildOptions, Job
from data_pipelines.building.reports import Reject, Removed, ShardReport, report_path
from data_pipelines.encode import StoredImage, prepare_image
from data_pipelines.errors import SampleError, Stopped
from data_pipelines.files import write_text
from data_pipelines.index import Sample
from data_pipelines.index.shard_index import image_extension
from data_pipelines.index.writer import ShardWriter
from data_pipelines.inputs.items import Item, ShardImage
from data_pipelines.inputs.reading import ItemContent, read_item
from data_pipelines.rights import RIGHTS_COLUMNS
from data_pipelines.table import Row, describe, table_path, write_table


def build_shard(
    job: Job, out: Path, options: BuildOptions, stopped: Callable[[], bool] = lambda: False
) -> ShardReport:
    """Write a shard, its index and its table; the report is what is written last and says that all of them
    are complete.

    A shard that ends up with no samples is not written. Raises ShardError where the disk does not let it,
    Stopped.
    """
    tar = out / job.name
    rejects: list[Reject] = []
    removed: list[Removed] = []
    rows: list[Row] = []
    with ShardWriter(tar) as writer:
        for key, item in zip(job.keys, job.items, strict=True):
            if stopped():
                raise Stopped(f"{out}: stopped; the same command goes on from here")
            try:
                made = _make_sample(key, item, options)
            except SampleError as error:
                rejects.append(Reject(item.origin, str(error)))
                continue
            if isinstance(made, Removed):
                removed.append(made)
                continue
            sample, row = made
            writer.add(sample)
            rows.append(row)
        if rows:
            write_table(rows, table_path(tar))
            writer.commit()
    report = ShardReport(job.name, len(rows), writer.size if rows else 0, tuple(rejects), tuple(removed))
    write_text(report_path(out, job.name), json.dumps(asdict(report), ensure_ascii=False))
    return report


def _make_sample(key: str, item: Item, options: BuildOptions) -> tuple[Sample, Row] | Removed:
    raw = read_item(item)
    columns = {**options.defaults, **raw.columns}
    shard_key = item.origin if isinstance(item.image, ShardImage) else None
    entry = _removal_entry(raw.image, shard_key, columns, options)
    if entry is None and options.image is not None:
        stored: StoredImage | None = prepare_image(raw.image, options.image)
        assert stored is not None
        entry = _removal_entry(stored.data, None, {}, options)
        columns["original_width"] = columns.get("original_width", stored.original_width)
        columns["original_height"] = columns.get("original_height", stored.original_height)
    else:
        stored = None
    if entry is not None:
        return Removed(item.origin, entry)
    sample = Sample(key, _members(raw, item, stored, columns))
    return sample, describe(
        sample, carried=columns, origin=columns.get("origin") or item.origin, phash=options.phash
    )


def _removal_entry(
    image: bytes, key: str | None, columns: Mapping[str, Any], options: BuildOptions
) -> str | None:
    if not len(options.removal):
        return None
    digest = hashlib.sha256(image).hexdigest()
    for known in (key, columns.get("origin")):
        entry = options.removal.match(key=known, sha256=digest, url=columns.get("url"))
        if entry is not None:
            return entry
    return None


def _members(
    raw: ItemContent, item: Item, stored: StoredImage | None, columns: Mapping[str, Any]
) -> dict[str, bytes]:
    if (
        raw.members
    ):  # from a shard: every member stays, in its order; the image may have changed its bytes and its name
        image = image_extension(raw.members)
        assert image is not None
        return {
            (stored.format if stored else image) if name == image else name: (stored.data if stored else data)
            if name == image
            else data
            for name, data in raw.members.items()
        }
    assert stored is not None, "only shards are copied unseen"
    members = {stored.format: stored.data, "txt": raw.captions[0].encode()}
    if item.label is not None:
        members["cls"] = str(item.label).encode()
    record: dict[str, Any] = {name: columns[name] for name in RIGHTS_COLUMNS if columns.get(name)}
    if len(raw.captions) > 1:
        record["captions"] = raw.captions
    if record:
        members["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    return members
