"""Kills a random rank of a training run at a random moment, again and again, and compares what comes out with
a run that nothing happened to: the loss of every step and the hash of the exported weights must be equal, to
the bit.

    python benchmarks/chaos.py --rounds 42 [--stages 1 2 3] [--seed 0]

The run has two ranks with two loader workers each, augmentation, patch dropout, bf16 autocast, and a
checkpoint every five steps. A third of the kills are aimed at the moment a checkpoint is being written.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.clipstack.launching import POLL_S, Job, Zygote
from tests.clipstack.training_runs import metrics, weights_hash, write_recipe, write_shards

CUT_SAVE = "in a save"
"""A kill that left a checkpoint half written."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=42, help="kills in all")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="ZeRO stages, in turn")
    parser.add_argument("--seed", type=int, default=0, help="decides ranks and moments")
    parser.add_argument("--latest", type=float, default=6.0, help="kill within so many seconds of the start")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        zygote = Zygote(root)
        recipe = write_recipe(root, write_shards(root / "shards"))
        rounds = [args.rounds // len(args.stages)] * len(args.stages)
        rounds[-1] += args.rounds - sum(rounds)
        good = [
            survives(zygote, recipe, root / f"stage-{stage}", stage, count, rng, args.latest)
            for stage, count in zip(args.stages, rounds, strict=True)
        ]
        zygote.close()
    return 0 if all(good) else 1


def survives(
    zygote: Zygote,
    recipe: Path,
    folder: Path,
    stage: int,
    rounds: int,
    rng: random.Random,
    latest_s: float,
    *,
    steps: int = 120,
    saves: int = 0,
) -> bool:
    """Whether a run killed `rounds` times equals one that was left alone. saves: of these kills, how many at
    least have to leave a checkpoint half written."""
    start = time.monotonic()
    options = [f"train.zero_stage={stage}", f"train.steps={steps}", "checkpoint.every_steps=5"]
    straight, killed = folder / "straight", folder / "killed"
    ended = zygote.train("--config", recipe, f"run.dir={straight}", *options, timeout_s=300)
    assert ended.codes == [0, 0], ended.text
    moments: Counter[str] = Counter()
    while sum(moments.values()) < rounds or moments[CUT_SAVE] < saves:
        job = zygote.start_training("--config", recipe, f"run.dir={killed}", *options, launcher=True)
        in_save, left = moments[CUT_SAVE] < saves, half_written(killed)
        moment = await_moment(job, killed, left, rng, latest_s, in_save=in_save)
        if job.has_ended():
            # It came through before its turn: from the start again, with the same data and the same end.
            assert job.wait().codes == [0, 0], job.log(0)
            assert equal(killed, straight), "an undisturbed end differs"
            killed = folder / f"killed-{sum(moments.values())}"
            continue
        with suppress(ProcessLookupError):  # it may have ended this very moment
            rank = rng.randrange(2)
            job.send(0 if in_save else rank, signal.SIGKILL)  # rank 0 is the one that writes
        job.wait(30)  # every rank stops within 30 s
        moments[CUT_SAVE if half_written(killed) - left else moment] += 1
    ended = zygote.train("--config", recipe, f"run.dir={killed}", *options, timeout_s=300)
    good = ended.codes == [0, 0] and equal(killed, straight)
    seconds = time.monotonic() - start
    counts = ", ".join(f"{count} {name}" for name, count in sorted(moments.items()))
    print(
        f"stage {stage}: {rounds} kills ({counts}), {seconds:.0f} s: {'equal' if good else 'DIFFERENT'}",
        flush=True,
    )
    return good


def await_moment(
    job: Job, run: Path, left: set[tuple[str, int]], rng: random.Random, latest_s: float, *, in_save: bool
) -> str:
    """Wait for the moment to strike; its name. in_save: while a checkpoint is being written; `left` are those
    that earlier kills have left."""
    end = time.monotonic() + rng.uniform(0.5, latest_s)
    in_save = rng.random() < 1 / 3 or in_save
    while not job.has_ended():
        if time.monotonic() >= end:
            if not in_save:
                return "at any time"
            with suppress(FileNotFoundError):  # it was finished this very moment
                if half_written(run) - left:
                    return "near a save"
        time.sleep(POLL_S / 10)
    return "too late"


def half_written(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when their writer died."""
    return {(path.name, path.stat().st_ino) for path in (run / "checkpoints").glob(".step-*.tmp")}


def equal(ours: Path, theirs: Path) -> bool:
    return metrics(ours) == metrics(theirs) and weights_hash(ours) == weights_hash(theirs)


if __name__ == "__main__":
    sys.exit(main())
