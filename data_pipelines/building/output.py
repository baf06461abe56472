"""The output folder of a build: claimed for one plan, resumed, finished, and told from another build's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines.building.reports import (
    WORK_FOLDER,
    BuildReport,
    ShardReport,
    read_json,
    reason_kind,
)
from data_pipelines.errors import DataError
from data_pipelines.files import write_text
from data_pipelines.index.shard_index import index_path
from data_pipelines.inputs.items import Inputs
from data_pipelines.table import table_path

FORMAT_VERSION = 1
REPORT = "build.json"
SIZES = "sizes.json"
"""Samples of each shard, as open_clip's trainer reads it."""
REJECTS = "rejects.jsonl"
REMOVED = "removed.jsonl"


@contextmanager
def claimed(out: Path, plan: Mapping[str, Any], inputs: Inputs) -> Iterator[None]:
    """The output folder, for this plan and this process alone, with what a killed run left half-done cleared
    away."""
    work = out / WORK_FOLDER
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
        before = read_json(work / "plan.json")
        if before is None:
            write_text(work / "plan.json", json.dumps({"plan": plan, "times": times}))
        else:
            refuse_other_plan(out, before["plan"], plan)
            if before["times"] != times:
                raise DataError(
                    f"{out}: the inputs changed since this build began; name a new folder or delete this one"
                )
        for partial in out.glob(".*.partial"):
            partial.unlink()
        yield
    shutil.rmtree(work)


def refuse_other_plan(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError where the plans differ."""
    if before.get("inputs") != now.get("inputs"):
        raise DataError(f"{out}: was built from other inputs; name a new folder or delete this one")
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


def finish_output(
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


def refuse_lost_shards(out: Path) -> None:
    """Raises DataError where a shard of a finished build is gone."""
    for name in read_json(out / SIZES) or ():
        for path in (out / name, index_path(out / name), table_path(out / name)):
            if not path.exists():
                raise DataError(
                    f"{out}: was finished, but {path.name} is gone; name a new folder or delete this one"
                )
