"""What every command that writes shards does: images and captions in, shards with index and table out;
atomic, resumable, byte-reproducible.

One shard is one job, a pure function of its items and the options. Jobs run in any number of processes and in
any order, and a shard that is complete is never touched again: that makes the output the same bytes however
it came about.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from data_pipelines.encode import ImageOptions, StoredImage, prepare_image
from data_pipelines.errors import DataError, SampleError, ShardError, Stopped
from data_pipelines.files import write_text
from data_pipelines.index import Sample, ShardWriter, index_path
from data_pipelines.inputs import (
    Inputs,
    Item,
    RawSample,
    ShardImage,
    read_item,
)
from data_pipelines.parallel import exit_with_parent
from data_pipelines.progress import Progress
from data_pipelines.rights import EMPTY, RIGHTS_COLUMNS, RemovalList
from data_pipelines.table import Row, describe, image_member, table_path, write_table

FORMAT_VERSION = 1
REPORT = "build.json"
SIZES = "sizes.json"
"""Samples of each shard, as open_clip's trainer reads it."""
REJECTS = "rejects.jsonl"
REMOVED = "removed.jsonl"
_WORK = ".build"


@dataclass(frozen=True)
class BuildOptions:
    image: ImageOptions | None = field(default_factory=ImageOptions)
    """None: image bytes are copied without a look at them beyond what the table needs."""
    samples_per_shard: int = 2000
    shard_bytes: int | None = None
    """Instead of a count, start a new shard before the images and captions of one exceed this; only where
    sizes are known."""
    shuffle_seed: int | None = None
    prefix: str = ""
    phash: bool = True
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Rights columns for samples that bring none."""
    removal: RemovalList = EMPTY

    def fingerprint(self) -> dict[str, Any]:
        """What the output depends on, as JSON."""
        return {
            **asdict(self),
            "removal": self.removal.digest if len(self.removal) else None,
            "defaults": dict(self.defaults),
        }


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    name: str
    keys: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Reject:
    origin: str
    reason: str


@dataclass(frozen=True)
class Removed:
    origin: str
    entry: str
    """The line of the removal list."""


@dataclass(frozen=True)
class ShardReport:
    name: str
    samples: int
    size_bytes: int
    rejects: tuple[Reject, ...]
    removed: tuple[Removed, ...]


@dataclass(frozen=True)
class BuildReport:
    shards: int
    samples: int
    size_bytes: int
    rejected: int
    removed: int
    reasons: Mapping[str, int]
    """Rejects by reason, without what is particular to one sample."""


# ---- planning: pure ----------------------------------------------------------------------------------------


def plan_jobs(
    items: Sequence[Item], options: BuildOptions, *, sizes: Sequence[int] | None = None
) -> list[Job]:
    """Which items make which shard, under which keys. `sizes`: bytes of each item, for `shard_bytes`."""
    if options.shuffle_seed is not None:
        order = np.random.default_rng(options.shuffle_seed).permutation(len(items))
        items = [items[i] for i in order]
        sizes = None if sizes is None else [sizes[i] for i in order]
    if options.shard_bytes is not None:
        assert sizes is not None, "shard_bytes needs sizes"
        groups = _cut_by_size(items, sizes, options.shard_bytes)
    else:
        step = options.samples_per_shard
        groups = [tuple(items[i : i + step]) for i in range(0, len(items), step)]
    return [
        Job(name=f"{options.prefix}{number:05d}.tar", keys=_keys(group, number, options), items=group)
        for number, group in enumerate(groups)
    ]


def _cut_by_size(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[tuple[Item, ...]]:
    groups: list[tuple[Item, ...]] = []
    current: list[Item] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if current and filled + size > limit:
            groups.append(tuple(current))
            current, filled = [], 0
        current.append(item)
        filled += size
    return [*groups, tuple(current)] if current else groups


def _keys(items: Sequence[Item], number: int, options: BuildOptions) -> tuple[str, ...]:
    """Numbers by place in the input, so that a reject leaves a gap and moves nobody; keys of shards stay as
    they are.

    Where shards that come together share a key, the later ones get `-1`, `-2`, ...
    """
    digits = max(4, len(str(options.samples_per_shard - 1)), len(str(len(items) - 1)))
    used: set[str] = set()
    out: list[str] = []
    for i, item in enumerate(items):
        wanted = item.key if item.key is not None else f"{number:05d}{i:0{digits}d}"
        key, again = wanted, 0
        while key in used:
            again += 1
            key = f"{wanted}-{again}"
        used.add(key)
        out.append(key)
    return tuple(out)


# ---- one shard ---------------------------------------------------------------------------------------------


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
    write_text(_report_path(out, job.name), json.dumps(asdict(report), ensure_ascii=False))
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
    raw: RawSample, item: Item, stored: StoredImage | None, columns: Mapping[str, Any]
) -> dict[str, bytes]:
    if (
        raw.members
    ):  # from a shard: every member stays, in its order; the image may have changed its bytes and its name
        image = image_member(raw.members)
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


# ---- all shards --------------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    options: BuildOptions,
    *,
    inputs: Inputs,
    processes: int = 1,
    label: str = "build",
) -> BuildReport:
    """Write the shards that are not there yet. Raises DataError if `out` holds something else, ShardError,
    Stopped."""
    plan = {
        "format_version": FORMAT_VERSION,
        "clipstack": version("clipstack"),
        "pillow": version("pillow"),
        "inputs": inputs.stamp,
        "shards": len(jobs),
        **options.fingerprint(),
    }
    plan = json.loads(json.dumps(plan))
    finished = _read_json(out / REPORT)
    if finished is not None:
        _refuse_other_plan(out, finished["plan"], plan)
        _refuse_lost_shards(out)
        return BuildReport(**finished["report"])
    with _claimed(out, plan, inputs):
        done = {job.name: report for job in jobs if (report := _read_report(out, job.name)) is not None}
        left = [job for job in jobs if job.name not in done]
        with Progress(label, len(jobs), unit="shards") as progress, _stop_on_signals() as stop:
            progress.advance(len(done))
            for report in _reports(left, out, options, processes, stop):
                done[report.name] = report
                progress.advance()
        reports = [done[job.name] for job in jobs]
        return _finish(out, plan, reports, inputs)


def _reports(
    jobs: Sequence[Job], out: Path, options: BuildOptions, processes: int, stop: Event
) -> Iterator[ShardReport]:
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield build_shard(job, out, options, stop.is_set)
        return
    # Fresh processes: polars and Pillow's libraries keep threads, which a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=context, initializer=_set_stop, initargs=(stop,)
    )
    waiting = iter(jobs)
    running: set[Future[ShardReport]] = set()
    try:
        while True:
            # A few jobs ahead are enough; all of them at once would copy every item into the queue.
            for job in islice(waiting, 2 * processes - len(running)):
                running.add(pool.submit(_build_in_worker, job, out, options))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker died (out of memory?); run the same command again, with fewer --processes"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


_worker_stop: Event | None = None


def _set_stop(stop: Event) -> None:
    """In a worker: the parent decides when to stop, a Ctrl-C at the terminal must not end the worker inside a
    write."""
    global _worker_stop
    _worker_stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


def _build_in_worker(job: Job, out: Path, options: BuildOptions) -> ShardReport:
    assert _worker_stop is not None
    return build_shard(job, out, options, _worker_stop.is_set)


@contextmanager
def _stop_on_signals() -> Iterator[Event]:
    """An event that SIGINT and SIGTERM set, instead of ending the process in the middle of something."""
    stop = multiprocessing.get_context("spawn").Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _claimed(out: Path, plan: Mapping[str, Any], inputs: Inputs) -> Iterator[None]:
    """The output folder, for this plan and this process alone, with what a killed run left half-done cleared
    away."""
    work = out / _WORK
    if not work.exists() and any(path.suffix == ".tar" for path in (out.iterdir() if out.is_dir() else ())):
        raise DataError(f"{out}: has shards that another command wrote; name a new folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from error
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{out}: another build is writing there; wait for it or name another folder"
            ) from error
        times = _times(inputs.files)
        before = _read_json(work / "plan.json")
        if before is None:
            write_text(work / "plan.json", json.dumps({"plan": plan, "times": times}))
        else:
            _refuse_other_plan(out, before["plan"], plan)
            if before["times"] != times:
                raise DataError(
                    f"{out}: the inputs changed since this build began; name a new folder or delete this one"
                )
        for partial in out.glob(".*.partial"):
            partial.unlink()
        yield
    shutil.rmtree(work)


def _refuse_other_plan(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            old, new = _difference(before.get(name), now.get(name))
            raise DataError(
                f"{out}: was built with {name} = {old}, now {new}; name a new folder or delete this one"
            )


def _difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two option groups only the fields that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return {name: old.get(name) for name in names}, {name: new.get(name) for name in names}
    return old, new


def _times(files: Sequence[str]) -> str:
    """A digest of the modification times, so that a resumed build does not mix two states of its inputs."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.stat(file).st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _finish(
    out: Path, plan: Mapping[str, Any], reports: Sequence[ShardReport], inputs: Inputs
) -> BuildReport:
    """Write what belongs to the whole: rejects, removals, class names, open_clip's sizes.json, and last the
    report."""
    written = [report for report in reports if report.samples]
    rejects = [reject for report in reports for reject in report.rejects]
    removed = [entry for report in reports for entry in report.removed]
    report = BuildReport(
        shards=len(written),
        samples=sum(r.samples for r in written),
        size_bytes=sum(r.size_bytes for r in written),
        rejected=len(rejects),
        removed=len(removed),
        reasons=dict(sorted(Counter(reason_kind(reject.reason) for reject in rejects).items())),
    )
    write_text(out / REJECTS, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects))
    if plan["removal"] is not None:
        write_text(out / REMOVED, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in removed))
    if inputs.classnames:
        write_text(out / "classnames.txt", "".join(name + "\n" for name in inputs.classnames))
    write_text(out / SIZES, json.dumps({r.name: r.samples for r in written}, indent=0))
    write_text(out / REPORT, json.dumps({"plan": plan, "report": asdict(report)}, indent=2, sort_keys=True))
    return report


def reason_kind(reason: str) -> str:
    """A reject's reason without its particulars, to count by."""
    for kind in (
        "cannot be read",
        "no caption",
        "no image",
        "over the limit",
        "smaller than",
        "longer than",
        "not an image",
    ):
        if kind in reason:
            return kind
    return reason.split(":", 1)[0]


def _report_path(out: Path, shard: str) -> Path:
    return out / _WORK / f"{shard}.json"


def _read_report(out: Path, shard: str) -> ShardReport | None:
    data = _read_json(_report_path(out, shard))
    if data is None:
        return None
    if data["samples"] and not _is_whole(out / shard, data["size_bytes"]):
        return None  # someone changed or deleted a file since; make the shard again
    return ShardReport(
        data["name"],
        data["samples"],
        data["size_bytes"],
        tuple(Reject(**r) for r in data["rejects"]),
        tuple(Removed(**r) for r in data["removed"]),
    )


def _is_whole(tar: Path, size_bytes: int) -> bool:
    beside = index_path(tar), table_path(tar)
    return all(path.exists() for path in (tar, *beside)) and tar.stat().st_size == size_bytes


def _refuse_lost_shards(out: Path) -> None:
    """Raises DataError where a shard of a finished build is gone."""
    for name in _read_json(out / SIZES) or ():
        for path in (out / name, index_path(out / name), table_path(out / name)):
            if not path.exists():
                raise DataError(
                    f"{out}: was finished, but {path.name} is gone; name a new folder or delete this one"
                )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: damaged; delete its folder and build again") from error
