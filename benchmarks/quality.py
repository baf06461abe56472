"""What a model learns: our recipe and its objectives beside open_clip's own trainer, at equal samples and at
equal time of one core.

    python benchmarks/quality.py --open-clip PYTHON --out DIR [--seeds 3] [--jobs 2] [--only ARM...] [--full]
    python benchmarks/quality.py --out DIR --report

Ten passes over CIFAR-10 with the model of configs/cifar10.toml, from scratch; then one evaluator for all:
zero-shot top-1 on the validation photos by `clipstack eval`, for which the peer's checkpoint is exported.
Each finished run is one JSON in DIR, and a run that has one is not repeated: break off and go on at will.
PYTHON is the environment of benchmarks/train.py. Every run has one thread, and a core of its own with
`--jobs`.

Equal time: an arm gets as many steps as it does in the processor time that open_clip's whole run of the same
seed took; its schedule is stretched to that length. Processor time, since it is wall time on an idle core
and hardly moves when the machine does other work as well.

With `--data shapes` the arms are ours alone, and every factor of the demo's test is reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.figures import logged_seconds, machine, versions  # noqa: E402
from benchmarks.quality_arms import ARMS, CORE, IN_EQUAL_TIME, ON_SHAPES, PEER  # noqa: E402
from benchmarks.quality_report import read_results, report, report_shapes  # noqa: E402
from benchmarks.running import Ran, hidden, keep_logs, run  # noqa: E402
from benchmarks.trainers import Job, export_peer, our_command, our_line, peer_command, peer_line  # noqa: E402

Budget = Literal["samples", "time"]
EPOCH_STEPS, EPOCHS = 156, 10
"""156 batches of 128 are one pass over the 20,000 training photos; the rest of 32 is left for the next."""
SHAPES_STEPS = 2300


@dataclass(frozen=True)
class Task:
    """One run to make. Its name is that of its JSON."""

    arm: str
    seed: int
    budget: Budget = "samples"
    data: str = "cifar10"

    @property
    def name(self) -> str:
        return f"{self.data}-{self.budget}-{self.arm}-seed{self.seed}"


def changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tables with dotted keys set; the given table stays as it is."""
    out = copy.deepcopy(dict(table))
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = out
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return out


def recipe_of(task: Task, data: Path, *, steps: int) -> dict[str, Any]:
    """The arm's recipe: no validation on the way, one checkpoint at the end, a log line for each step."""
    name = "demo" if task.data == "shapes" else "cifar10"
    table = tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8"))
    del table["data"]["val"]
    table.pop("eval", None)
    train = f"{data}/train-*.tar" if task.data == "shapes" else f"{data}/train-{{00000..00009}}.tar"
    fixed = {
        "seed": task.seed, "data.train": train, "data.workers": 1, "train.steps": steps,
        "train.precision": "fp32", "log.every_steps": 1, "checkpoint.every_minutes": 0.0,
    }  # fmt: skip
    return changed(table, {**fixed, **ARMS[task.arm].changes})


def epochs_of(steps: int) -> int:
    """Into how many epochs the peer cuts the steps: whole passes over the data, or one part of a pass."""
    if steps < EPOCH_STEPS:
        return 1
    if steps % EPOCH_STEPS:
        raise ValueError(f"{steps} steps are no whole number of passes of {EPOCH_STEPS} steps")
    return steps // EPOCH_STEPS


def steps_in_time(own: Mapping[str, Any], peer: Mapping[str, Any]) -> int:
    """Steps that an arm does in the core-seconds of the peer's run, by its own run at equal samples."""
    return round(peer["cpu_s"] / own["cpu_s"] * own["steps"])


def plan(args: argparse.Namespace) -> list[list[Task]]:
    """The tasks in two stages: how many steps fit a time is known after the first."""
    known = ON_SHAPES if args.data == "shapes" else tuple(ARMS if args.full else CORE)
    arms = [arm for arm in args.only or known if args.open_clip or not ARMS[arm].peer]
    seeds = [args.seed] if args.seed is not None else range(args.seeds)
    first = [Task(arm, seed, "samples", args.data) for seed in seeds for arm in arms]
    timed = [] if args.data == "shapes" or "time" not in args.budgets else IN_EQUAL_TIME
    second = [Task(arm, seed, "time") for seed in seeds for arm in arms if arm in timed]
    return [first if "samples" in args.budgets else [], second]


def perform(task: Task, args: argparse.Namespace, *, core: int) -> dict[str, Any]:
    """Train, evaluate, and write the task's JSON."""
    folder = args.out / "runs" / task.name
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    folder.mkdir(parents=True)
    steps = args.steps
    if task.budget == "time":
        samples = [read_result(args.out, Task(arm, task.seed)) for arm in (task.arm, PEER)]
        if None in samples:
            raise FileNotFoundError(f"{task.name} needs the runs at equal samples of {task.arm} and {PEER}")
        steps = steps_in_time(*samples)
    recipe = recipe_of(task, args.data_dir, steps=steps)
    is_peer = ARMS[task.arm].peer
    cores = (core,) if args.jobs > 1 else ()
    job = Job(recipe, num_epochs=epochs_of(steps) if is_peer else 1, cores=cores)
    ran, model = _train_peer(job, folder, args) if is_peer else _train_ours(job, folder)
    folders = {"REPO": ROOT, "RUN": folder, "DATA": args.data_dir, "PYTHON": sys.executable}
    folders |= {"PEER": args.open_clip} if args.open_clip else {}
    result = {
        **asdict(task),
        "about": ARMS[task.arm].about,
        "steps": steps,
        "samples": steps * recipe["train"]["batch_size"],
        "train_s": logged_seconds(ran.lines, batch_size=recipe["train"]["batch_size"]),
        "wall_s": ran.wall_s,
        "cpu_s": ran.cpu_s,
        "first_loss": ran.lines[0].loss,
        "last_loss": ran.lines[-1].loss,
        "logit_scale": ran.lines[-1].scale,
        "values": evaluate(task, model, folder, args),
        "jobs": args.jobs,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(args.open_clip if is_peer else sys.executable),
        "command": hidden(" ".join(ran.command), folders),
    }
    keep_logs(folder, ran, args.out / "logs" / task.name, folders)
    path = args.out / f"{task.name}.json"
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)
    shutil.rmtree(folder)
    return result


def _train_ours(job: Job, folder: Path) -> tuple[Ran, Path]:
    return run(*our_command(job, folder), our_line, job), folder / "run" / "export"


def _train_peer(job: Job, folder: Path, args: argparse.Namespace) -> tuple[Ran, Path]:
    batch_size = job.recipe["train"]["batch_size"]
    command, log = peer_command(job, folder, python=args.open_clip)
    ran = run(command, log, lambda line: peer_line(line, batch_size=batch_size), job)
    checkpoint = log.parent / "checkpoints" / f"epoch_{job.num_epochs}.pt"
    return ran, export_peer(checkpoint, job.recipe["model"], folder / "export")


def evaluate(task: Task, model: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Fractions by name; the same evaluator for all."""
    if task.data == "shapes":
        from clipstack.demo.examination import examine

        return {name: score.accuracy for name, score in examine(model, args.data_dir).scores.items()}
    out = folder / "eval.json"
    val = f"{args.data_dir}/val-{{00000..00001}}.tar"
    subprocess.run(
        [sys.executable, "-m", "clipstack.cli", "eval", "--model", str(model), "--data", val,
         "--task", "zeroshot", "--json", str(out)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return {"top1": json.loads(out.read_text(encoding="utf-8"))["top1"]}


def read_result(out: Path, task: Task) -> dict[str, Any] | None:
    path = out / f"{task.name}.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_stage(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """The tasks that have no result yet, `--jobs` at a time, each on a core of its own."""
    free: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: args.jobs]:
        free.put(core)

    def one(task: Task) -> None:
        core = free.get()
        try:
            result = perform(task, args, core=core)
        finally:
            free.put(core)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in list(result["values"].items())[:4])
        print(f"{task.name}: {shown}, {result['train_s']:.0f} s", file=sys.stderr, flush=True)

    results = {task: read_result(args.out, task) for task in tasks}
    for task, result in results.items():
        if result is not None and task.budget == "samples" and result["steps"] != args.steps:
            sys.exit(f"{args.out}/{task.name}.json: of {result['steps']} steps; take another folder")
    todo = [task for task, result in results.items() if result is None]
    print(f"{len(todo)} of {len(tasks)} runs to do", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(one, todo):
            pass


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results, one JSON a run, and logs"
    )
    parser.add_argument("--open-clip", metavar="PYTHON", help="interpreter of an environment with the peer")
    parser.add_argument("--data", choices=("cifar10", "shapes"), default="cifar10")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="its shards, if elsewhere")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--only", nargs="+", choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--full", action="store_true", help="all arms, not only the first five")
    parser.add_argument("--budgets", nargs="+", choices=("samples", "time"), default=["samples", "time"])
    parser.add_argument("--steps", type=int, help=f"default: {EPOCH_STEPS * EPOCHS}; shapes: {SHAPES_STEPS}")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print the table of what is there; run nothing")
    args = parser.parse_args(argv)
    shapes = args.data == "shapes"
    args.out = args.out.resolve()
    default = args.out / "shapes" if shapes else ROOT / "../shared/data/cifar10"
    args.data_dir = (args.data_dir or default).resolve()
    args.steps = args.steps or (SHAPES_STEPS if shapes else EPOCH_STEPS * EPOCHS)
    return args


def prepare_data(args: argparse.Namespace) -> None:
    """Draw the shapes where they are absent; exits where photos are."""
    if any(args.data_dir.glob("train-*.tar")):
        return
    if args.data == "cifar10":
        sys.exit(f"{args.data_dir}: no train-*.tar; name a folder of CIFAR-10 shards with --data-dir")
    from data_pipelines.shapes import generate

    generate(args.data_dir, num_train=30_000, num_test=1000)


def main() -> int:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        prepare_data(args)
        for stage in plan(args):
            run_stage(stage, args)
    results = [result for result in read_results(args.out) if result["data"] == args.data]
    if not results:
        sys.exit(f"{args.out}: no results yet")
    print(report_shapes(results) if args.data == "shapes" else report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
