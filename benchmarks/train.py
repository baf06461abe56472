"""Training speed: our trainer beside open_clip's own, on the same model, data, batch, precision and steps.

    python benchmarks/train.py --open-clip PYTHON [--cases NAME...] [--rounds 5] [--json OUT] [--plots DIR]

PYTHON is the interpreter of an environment with `open_clip_torch==3.3.0 webdataset==0.2.86 transformers` and
our torch and torchvision. Left out, that peer is left out. Both trainers are started by their real command,
in turns (ABBA), each with all cores; samples a second are taken from outside, by when the lines of their logs
arrive, the same way for both. Time to first step counts from the start of the process. The first turn of
each, short, warms up caches and does not count.

The GPU cases need a GPU: `--cases vit-b-32-real vit-b-32-synthetic vit-b-16-real vit-b-16-synthetic`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.figures import Spread, alternating, machine, ratios, steady_rate, versions  # noqa: E402
from benchmarks.running import Ran, hidden, keep_logs, run  # noqa: E402
from benchmarks.trainers import Job, our_command, our_line, peer_command, peer_line  # noqa: E402

WARM_UP_STEPS = 1
PHOTO_SHARDS = 8
FLAT_SHARDS, FLAT_SAMPLES = 16, 256
OURS, OUR_RANKS, PEER = "clipstack", "clipstack, 2 ranks", "open_clip"


@dataclass(frozen=True)
class Case:
    """What is trained. data: cifar10, photos or flat; skip, tail: steps at either end that do not count."""

    about: str
    model: Mapping[str, Any]
    data: str
    batch_size: int
    steps: int
    precision: str = "fp32"
    workers: int = 2
    skip: int = 3
    tail: int = 0
    device: str = "cpu"


def small_model(*, context_length: int) -> dict[str, Any]:
    return {
        "embed_dim": 192,
        "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 192, "layers": 6, "head_width": 64},
        "text_cfg": {
            "context_length": context_length, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2,
        },
    }  # fmt: skip


TINY_MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "patch_size": 56, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
"""Costs next to nothing, so that decoding and augmenting decide."""

COMPUTE = Case(
    about="6 layers of width 192, patch 4, 32 px; text: 2 layers, context 77; CIFAR-10",
    model=small_model(context_length=77),
    data="cifar10",
    batch_size=256,
    steps=20,
)
CPU_CASES = {
    "compute": COMPUTE,
    "compute-bf16": replace(COMPUTE, precision="bf16", about=f"{COMPUTE.about}; autocast bf16"),
    "compute-short": replace(
        COMPUTE,
        model=small_model(context_length=16),
        about="the first with a context of 16, where no text is padding for long",
    ),
    "loader": Case(
        about="photos of about 118 KB to 224 px for a model of one layer: decoding decides",
        model=TINY_MODEL, data="photos", batch_size=64, steps=28, skip=8, tail=4,
    ),
}  # fmt: skip


def _gpu_case(name: str, data: str, *, batch_size: int) -> Case:
    return Case(
        about=f"{name} at 224 px, {'photos' if data == 'photos' else 'one flat picture, cheap to decode'}",
        model={"name": name}, data=data, batch_size=batch_size, steps=72, precision="bf16",
        workers=min(12, os.cpu_count() or 1), skip=24, tail=8, device="cuda",
    )  # fmt: skip


GPU_CASES = {
    f"{name.lower()}-{kind}": _gpu_case(name, data, batch_size=batch_size)
    for name, batch_size in (("ViT-B-32", 1024), ("ViT-B-16", 512))
    for kind, data in (("real", "photos"), ("synthetic", "flat"))
}
CASES = CPU_CASES | GPU_CASES


def recipe_of(case: Case, data: str, *, seed: int, compiled: bool = False) -> dict[str, Any]:
    """The recipe both are asked for. Duplicates are not masked, since the peer cannot; no validation."""
    return {
        "seed": seed,
        "model": {**case.model, **({"compile": True} if compiled else {})},
        "objective": {"name": "clip", "mask_duplicates": False},
        "data": {"train": data, "workers": case.workers, "augment": {"crop_scale": (0.9, 1.0)}},
        "train": {"steps": case.steps, "batch_size": case.batch_size, "precision": case.precision},
        "optim": {"lr": 5e-4, "betas": (0.9, 0.98), "weight_decay": 0.2, "grad_clip_norm": 1.0},
        "log": {"every_steps": 1},
    }


# ---- Data ----


def write_photo_shards(photos: Path, folder: Path) -> str:
    """The photos, several times over, as one shard each; returns their brace pattern."""
    from data_pipelines.index import build_index

    folder.mkdir()
    for number in range(PHOTO_SHARDS):
        shard = folder / f"{number:05}.tar"
        shutil.copyfile(photos, shard)
        build_index(shard)
    return f"{folder}/{{00000..{PHOTO_SHARDS - 1:05}}}.tar"


def write_flat_shards(folder: Path) -> str:
    """One flat picture of 224 px again and again: what a loader costs when decoding costs little."""
    from PIL import Image

    from data_pipelines.index import Sample, write_shard

    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (224, 224), (90, 120, 150)).save(buffer, "JPEG")
    members = {"jpg": buffer.getvalue(), "txt": b"a photo of nothing much at all"}
    for number in range(FLAT_SHARDS):
        rows = [Sample(f"{number:02}{row:05}", members) for row in range(FLAT_SAMPLES)]
        write_shard(folder / f"{number:05}.tar", rows)
    return f"{folder}/{{00000..{FLAT_SHARDS - 1:05}}}.tar"


def data_of(case: Case, args: argparse.Namespace, scratch: Path) -> str:
    """The shards of a case, made where they are not there yet. Exits where its source is absent."""
    if case.data == "cifar10":
        if not (args.cifar10 / "train-00000.tar").is_file():
            sys.exit(f"{args.cifar10}: no train-00000.tar; name a folder of small photos with --cifar10")
        return f"{args.cifar10}/train-{{00000..00009}}.tar"
    folder = scratch / case.data
    if case.data == "flat":
        return (
            write_flat_shards(folder)
            if not folder.exists()
            else f"{folder}/{{00000..{FLAT_SHARDS - 1:05}}}.tar"
        )
    if not args.photos.is_file():
        sys.exit(f"{args.photos}: no such file; name one shard of photos with --photos")
    if not folder.exists():
        return write_photo_shards(args.photos, folder)
    return f"{folder}/{{00000..{PHOTO_SHARDS - 1:05}}}.tar"


# ---- Contestants ----


def contestants(args: argparse.Namespace) -> dict[str, Callable[[Job, Path], Ran]]:
    """Name -> what trains a job in a folder."""

    def ours(job: Job, folder: Path) -> Ran:
        return run(*our_command(job, folder), our_line, job)

    def our_ranks(job: Job, folder: Path) -> Ran:
        split = replace(job, ranks=2, threads=max(1, job.threads // 2))
        return run(*our_command(split, folder), our_line, split)

    def peer(job: Job, folder: Path) -> Ran:
        batch_size = job.recipe["train"]["batch_size"]
        command, log = peer_command(job, folder, python=args.open_clip)
        return run(command, log, lambda line: peer_line(line, batch_size=batch_size), job)

    found = {OURS: ours}
    if args.ranks:
        found[OUR_RANKS] = our_ranks
    if args.open_clip:
        found[PEER] = peer
    return found


def race(name: str, case: Case, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All rounds of one case: raw figures of every run, by contestant."""
    entries = contestants(args)
    data = data_of(case, args, scratch)
    kept: dict[str, list[dict[str, Any]]] = {entry: [] for entry in entries}
    for entry, train in entries.items():
        warm = replace(case, steps=WARM_UP_STEPS * case.workers)
        recipe = recipe_of(warm, data, seed=0, compiled=args.compile)
        train(
            Job(recipe, threads=args.threads, device=case.device), _fresh(scratch, f"{name}-warm-up-{entry}")
        )
    for number, entry in alternating(list(entries), args.rounds):
        recipe = recipe_of(case, data, seed=number, compiled=args.compile)
        job = Job(recipe, threads=args.threads, device=case.device)
        folder = _fresh(scratch, f"{name}-{number}-{entry}")
        ran = entries[entry](job, folder)
        folders = {"REPO": ROOT, "RUN": folder, "DATA": Path(data).parent, "PYTHON": sys.executable}
        folders |= {"PEER": args.open_clip} if args.open_clip else {}
        kept[entry].append({**figures(ran, case), "command": hidden(" ".join(ran.command), folders)})
        if args.logs:
            keep_logs(folder, ran, args.logs / folder.name, folders)
        print(
            f"{name}, round {number + 1}, {entry}: {kept[entry][-1]['samples_per_s']:.1f} samples/s",
            file=sys.stderr,
        )
        shutil.rmtree(folder)
    return {"about": case.about, "case": asdict(case), "runs": kept}


def _fresh(scratch: Path, name: str) -> Path:
    folder = scratch / name.replace(", ", "-").replace(" ", "-")
    folder.mkdir()
    return folder


def figures(ran: Ran, case: Case) -> dict[str, Any]:
    """What is kept of a run: figures, and every step's loss and arrival."""
    return {
        "samples_per_s": steady_rate(ran, batch_size=case.batch_size, skip=case.skip, tail=case.tail),
        "first_step_s": ran.arrived_s[0],
        "wall_s": ran.wall_s,
        "cpu_s": ran.cpu_s,
        "device_memory_gib": ran.device_memory_gib,
        "load_average": os.getloadavg()[0],
        "loss": [line.loss for line in ran.lines],
        "arrived_s": [round(at, 3) for at in ran.arrived_s],
        "own_samples_per_s": [line.rate for line in ran.lines],
    }


# ---- Report ----


def column(result: Mapping[str, Any], entry: str, figure: str) -> list[float]:
    return [run[figure] for run in result["runs"][entry]]


def summary(results: Mapping[str, Any]) -> str:
    """Markdown: one row a case and trainer; ratios are ours by the peer's, round by round."""
    lines = [
        "| case | trainer | samples/s | to the first step, s | core-seconds | ratio to open_clip |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        for entry in result["runs"]:
            rate, first, cpu = (
                Spread.of(column(result, entry, figure))
                for figure in ("samples_per_s", "first_step_s", "cpu_s")
            )
            ratio = ""
            if entry != PEER and PEER in result["runs"]:
                both = (column(result, side, "samples_per_s") for side in (entry, PEER))
                ratio = f"**{ratios(*both)}**"
            lines.append(f"| {name} | {entry} | {rate} | {first} | {cpu.median:.0f} | {ratio} |")
    return "\n".join(lines)


def gpu_summary(results: Mapping[str, Any]) -> str:
    """Memory, and MFU by one formula for both: operations of the whole model and context, by the device's
    peak."""
    import torch

    from clipstack.config.models import ModelConfig
    from clipstack.model import build_model
    from clipstack.training.flops import flops_per_pair, peak_flops

    lines = ["| case | trainer | MFU | memory, GiB |", "| --- | --- | --- | --- |"]
    peak = peak_flops(torch.device("cuda"), "bf16")
    for name, result in results.items():
        flops = flops_per_pair(build_model(ModelConfig.model_validate(result["case"]["model"]), seed=0))
        for entry in result["runs"]:
            rate = Spread.of(column(result, entry, "samples_per_s")).median
            memory = Spread.of(column(result, entry, "device_memory_gib"))
            mfu = "peak unknown" if peak is None else f"{rate * flops / peak:.3f}"
            lines.append(f"| {name} | {entry} | {mfu} | {memory.most:.1f} |")
    return "\n".join(lines)


def draw_losses(name: str, result: Mapping[str, Any], out: Path) -> Path:
    """Every run's loss over the steps, one colour a trainer."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # Equal files from equal runs: no date, no random ids.
    plt.rcParams.update(
        {"svg.hashsalt": "clipstack", "svg.fonttype": "none", "font.size": 9, "figure.dpi": 72}
    )
    figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
    for colour, (entry, runs) in enumerate(result["runs"].items()):
        for number, ran in enumerate(runs):
            label = entry if number == 0 else None
            steps = range(1, len(ran["loss"]) + 1)
            axes.plot(steps, ran["loss"], color=f"C{colour}", alpha=0.6, linewidth=1.0, label=label)
    axes.set(xlabel="step", ylabel="CLIP loss", title=f"{name}: a line for each run")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"train-loss-{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--open-clip", metavar="PYTHON", help="interpreter of an environment with the peer")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CPU_CASES), metavar="NAME",
                        help=f"of {', '.join(CASES)} (default: those for a CPU)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of a run, in place of the case's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each trainer (default: all)")
    parser.add_argument(
        "--ranks", action="store_true", help="also ours as two ranks of the deepspeed command"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile, in both trainers")
    shared = ROOT / "../shared/data"
    parser.add_argument("--cifar10", type=Path, default=shared / "cifar10", metavar="DIR")
    parser.add_argument("--photos", type=Path, default=shared / "photos/photos-00000.tar", metavar="TAR")
    parser.add_argument("--json", type=Path, metavar="OUT", help="raw figures of every run")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep every run's log and configuration")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the losses of each case")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the trainer is ended too
    args.cifar10 = args.cifar10.resolve()
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": args.threads,
        "compiled": args.compile,
        "versions": {OURS: versions(sys.executable)},
        "cases": {},
    }
    if args.open_clip:
        report["versions"][PEER] = versions(args.open_clip)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            case = CASES[name] if args.steps is None else replace(CASES[name], steps=args.steps)
            report["cases"][name] = race(name, case, args, Path(folder))
            if args.json:  # after each case: a later one may fail
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("date", "machine", "threads", "versions")}, indent=1))
    print(summary(report["cases"]))
    on_gpu = {name: result for name, result in report["cases"].items() if result["case"]["device"] == "cuda"}
    if on_gpu:
        print(gpu_summary(on_gpu))
    if args.plots:
        for name, result in report["cases"].items():
            print(draw_losses(name, result, args.plots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
