"""All shards of a build: the jobs that are left, in one process or many, until done or asked to stop."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType

from data_pipelines.building.output import (
    FORMAT_VERSION,
    REPORT,
    claimed,
    finish_output,
    refuse_lost_shards,
    refuse_other_plan,
)
from data_pipelines.building.plan import BuildOptions, Job
from data_pipelines.building.reports import BuildReport, ShardReport, read_json, read_report
from data_pipelines.building.shard import build_shard
from data_pipelines.errors import ShardError
from data_pipelines.inputs.items import Inputs
from data_pipelines.parallel import exit_with_parent
from data_pipelines.progress import Progress


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
    finished = read_json(out / REPORT)
    if finished is not None:
        refuse_other_plan(out, finished["plan"], plan)
        refuse_lost_shards(out)
        return BuildReport(**finished["report"])
    with claimed(out, plan, inputs):
        done = {job.name: report for job in jobs if (report := read_report(out, job.name)) is not None}
        left = [job for job in jobs if job.name not in done]
        with Progress(label, len(jobs), unit="shards") as progress, _stop_on_signals() as stop:
            progress.advance(len(done))
            for report in _reports(left, out, options, processes, stop):
                done[report.name] = report
                progress.advance()
        reports = [done[job.name] for job in jobs]
        return finish_output(out, plan, reports, inputs)


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
