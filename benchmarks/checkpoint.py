"""How long a checkpoint holds up training, and how long the writing takes behind its back.

    python benchmarks/checkpoint.py [--model ViT-B-32] [--repeats 3] [--folder DIR]

One process, ZeRO stage 1. Copying the state is what training waits for; writing, hashing and flushing go on
in a thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipstack.config import parse_recipe, to_toml
from clipstack.training.engine import Engine, start_distributed, stop_distributed

import torch  # isort: skip

from clipstack.checkpoint.snapshot import Snapshot, save_snapshot
from clipstack.model import build_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder"
    )
    args = parser.parse_args()
    world = start_distributed()
    recipe = parse_recipe(
        {
            "model": args.model,
            "data": {"train": "."},
            "train": {"steps": 10, "batch_size": 2, "precision": "fp32"},
        }
    )
    engine = Engine(build_model(recipe.model, seed=0), recipe, world)
    engine.train()
    embeddings = engine.forward(torch.randn(2, 3, 224, 224), torch.randint(1, 49408, (2, 77)))
    engine.backward((embeddings.image * embeddings.text).sum() * embeddings.logit_scale)
    engine.step(1e-4)  # makes AdamW's state
    copying, copying_cpu, writing, size = [], [], [], 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for step in range(1, args.repeats + 1):
            start, used = time.perf_counter(), time.process_time()
            weights, optimizer = engine.weights(), engine.optimizer_state()
            copying.append(time.perf_counter() - start)
            copying_cpu.append(time.process_time() - used)
            snapshot = Snapshot(
                step=step, samples_seen=0, record=engine.model.record, max_logit_scale=4.6, weights=weights,
                optimizer=optimizer, objective={}, order={}, recipe_toml=to_toml(recipe),
            )  # fmt: skip
            start = time.perf_counter()
            path = save_snapshot(Path(folder), snapshot)
            writing.append(time.perf_counter() - start)
            size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{args.model}: {size / 1e9:.2f} GB a checkpoint, {args.repeats} repeats")
    timings = {
        "copying (training waits)": copying,
        "the same, processor time": copying_cpu,
        "writing (behind its back)": writing,
    }
    for name, seconds in timings.items():
        print(
            f"{name:26} median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}"
        )
    stop_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
