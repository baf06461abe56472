"""Tiled retrieval beside the materialised way (the whole matrix, then top-k, as evaluation code in the field
does it).

    python benchmarks/retrieval.py [--rounds 5]                   20,000 both ways, then 200,000 tiled

Random unit-norm features, every measurement in a process of its own; memory is the process's peak above what
stood before, features included. Both give image-to-text and text-to-image R@1, R@5 and R@10, and must give
the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file, without an installation of the checkout
    sys.path.insert(0, str(REPOSITORY))

from benchmarks.figures import Spread, alternating, machine, ratios, versions  # noqa: E402

WAYS = ("materialised", "tiled")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--both", type=int, default=20_000, help="pairs for both ways; 0: leave out")
    parser.add_argument("--tiled", type=int, default=200_000, help="pairs for the tiled way; 0: leave out")
    parser.add_argument("--rounds", type=int, default=5, help="of both ways, which take turns (default: 5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.dim, args.threads)))
        return
    results = []
    for _, way in alternating(WAYS, args.rounds if args.both else 0):
        results.append(in_own_process(way, args.both, args))
        print(line(results[-1]), flush=True)
    if results:
        assert all(result["metrics"] == results[0]["metrics"] for result in results), "the two ways disagree"
        print(beside(results))
    if args.tiled:
        results.append(in_own_process("tiled", args.tiled, args))
        print(line(results[-1]), flush=True)
    if args.json:
        about = {"date": datetime.date.today().isoformat(), "machine": machine(), "threads": args.threads}
        about["versions"] = versions(sys.executable)
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def beside(results: list[dict[str, Any]]) -> str:
    """Medians and spreads of both ways, and tiled by materialised round by round."""
    lines = []
    for key in ("seconds", "cpu_seconds", "gib"):
        whole, tiled = ([one[key] for one in results if one["way"] == way] for way in WAYS)
        spreads = f"materialised {Spread.of(whole)}, tiled {Spread.of(tiled)}"
        lines.append(f"{key:<12}{spreads}, tiled / materialised {ratios(tiled, whole)}")
    return "\n".join(lines)


def in_own_process(way: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", way, str(size), "--dim", str(args.dim)]
    done = subprocess.run(
        [*command, "--threads", str(args.threads)], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(way: str, size: int, dim: int, threads: int) -> dict[str, Any]:
    import torch
    from torch.nn.functional import normalize

    from clipstack.retrieval import RECALL_AT, retrieval_metrics, retrieval_ranks

    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(0)
    before = peak_bytes()
    images = normalize(torch.randn(size, dim, generator=rng), dim=1)
    texts = normalize(images + 2 * dim**-0.5 * torch.randn(size, dim, generator=rng), dim=1)
    start, cpu_start = time.perf_counter(), time.process_time()
    if way == "tiled":
        metrics = retrieval_metrics(retrieval_ranks(images, texts))
        metrics = {name: value for name, value in metrics.items() if "median" not in name}
    else:
        scores = images @ texts.T
        own = torch.arange(size)[:, None]
        metrics = {}
        for direction, matrix in (("image_to_text", scores), ("text_to_image", scores.T)):
            places = (matrix.topk(max(RECALL_AT), dim=1).indices == own).double()
            metrics |= {f"{direction}_r{k}": float(places[:, :k].sum(dim=1).mean()) for k in RECALL_AT}
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "way": way,
        "size": size,
        "dim": dim,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gib": (peak_bytes() - before) / 2**30,
        "process_gib": peak_bytes() / 2**30,
        "metrics": metrics,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['way']:<14}{result['size']:>9,} pairs x {result['dim']} dims {result['seconds']:8.1f} s"
        f"{result['cpu_seconds']:8.1f} core-s"
        f"{result['gib']:8.2f} GiB added, {result['process_gib']:.2f} GiB in all; "
        f"R@1 {result['metrics']['image_to_text_r1']:.4f} / {result['metrics']['text_to_image_r1']:.4f}"
    )


if __name__ == "__main__":
    main()
