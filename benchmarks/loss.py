"""Our objectives beside open_clip's ClipLoss: wall time and added memory of one forward and backward pass.

    python benchmarks/loss.py                          CPU, fp32, N = 4096, 8192, 16384
    python benchmarks/loss.py --device cuda [--triton] bf16, N = 32768, 65536, 131072
    python benchmarks/loss.py --losses mixing siglip   these beside ClipLoss and our clip

Every measurement is a fresh process, and the contestants take turns. Wall time is that of one pass after a
small warm-up; added memory is the peak above what stood before the pass, with the features in place, so it
includes the gradients.
Prints a table of medians with their spread and ratios to ClipLoss, and writes every single figure to --json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEER = "open_clip ClipLoss"
OURS: dict[str, dict[str, Any]] = {
    "clip": {"name": "clip"},
    "hard_negative": {"name": "hard_negative", "beta": 0.5},
    "debiased": {"name": "debiased", "tau_plus": 1e-4},
    "dcl": {"name": "dcl"},
    "siglip": {"name": "siglip"},
    "mixing": {"name": "clip", "mixing": {"top_k": 64, "count": 16}},
    "individual_temperature": {"name": "clip", "individual_temperature": {}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs in the batch")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant; 3 from N = 16384 on")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--triton", action="store_true", help="our tiles in Triton instead of torch (cuda)")
    parser.add_argument(
        "--losses",
        choices=[*OURS],
        nargs="+",
        default=["hard_negative"],
        help="beside ClipLoss and our clip (default: hard_negative)",
    )
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    sizes = args.sizes or ([4096, 8192, 16384] if args.device == "cpu" else [32768, 65536, 131072])
    results = [result for size in sizes for result in compare(size, args)]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(args), "results": results}, indent=1) + "\n")
    print(table(results))


def compare(size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All contestants at one size, in turns, each in a process of its own."""
    figures: dict[str, list[dict[str, float]]] = {
        name: [] for name in dict.fromkeys((PEER, "clip", *args.losses))
    }
    for _ in range(args.rounds if size < 16384 else min(args.rounds, 3)):
        for name, runs in figures.items():
            command = [sys.executable, __file__, "--one", name, "--sizes", str(size), "--dim", str(args.dim)]
            command += [
                "--threads",
                str(args.threads),
                "--device",
                args.device,
                *(["--triton"] * args.triton),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    return [{"n": size, "contestant": name, "runs": runs} for name, runs in figures.items()]


def table(results: list[dict[str, Any]]) -> str:
    """Medians with their spread, and their ratio to those of the peer and of our clip at the same N."""
    lines = [
        "| N | loss | wall s (least-most) | x peer | x clip | CPU s, x peer, x clip | added GiB, x peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    medians = {
        (r["n"], r["contestant"], key): median(r, key)
        for r in results
        for key in ("wall_s", "cpu_s", "added_bytes")
    }
    for result in results:
        n, name = result["n"], result["contestant"]
        wall, cpu, added = (medians[n, name, key] for key in ("wall_s", "cpu_s", "added_bytes"))
        lines.append(
            f"| {n} | {name} | {wall:.2f} ({spread(result, 'wall_s', 1)}) "
            f"| {wall / medians[n, PEER, 'wall_s']:.2f} | {wall / medians[n, 'clip', 'wall_s']:.2f} "
            f"| {cpu:.2f}, {cpu / medians[n, PEER, 'cpu_s']:.2f}, {cpu / medians[n, 'clip', 'cpu_s']:.2f} "
            f"| {added / 2**30:.3f}, {added / medians[n, PEER, 'added_bytes']:.3f} |"
        )
    return "\n".join(lines)


def median(result: dict[str, Any], key: str) -> float:
    return statistics.median(run[key] for run in result["runs"])


def spread(result: dict[str, Any], key: str, unit: float) -> str:
    values = [run[key] / unit for run in result["runs"]]
    return f"{min(values):.2f}-{max(values):.2f}"


def machine(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "device": args.device,
        "dim": args.dim,
    }


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One contestant, one size, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    step = contestant(args)
    features(1024, args, step)  # warm-up: libraries and thread pools
    return features(args.sizes[0], args, step)


def contestant(args: argparse.Namespace) -> Any:
    """(image, text, logit_scale) -> loss."""
    if args.one == PEER:
        loss = load_clip_loss()()
        return lambda image, text, logit_scale: loss(image, text, logit_scale.exp())
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from clipstack.losses import Embeddings, build_objective
    from clipstack.world import World

    objective = build_objective(OURS[args.one], World(device=torch.device(args.device)), triton=args.triton)
    bias = torch.tensor(-10.0, device=args.device, requires_grad=True) if args.one == "siglip" else None
    return lambda image, text, logit_scale: (
        objective(Embeddings(image, text, logit_scale, bias), sample_index=torch.arange(len(image))).total
    )


def load_clip_loss() -> Any:
    """open_clip.loss.ClipLoss from its own file: the package would load every tower and torchvision too."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise SystemExit("open_clip is not installed: pip install open_clip_torch")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).parent / "loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss


def features(size: int, args: argparse.Namespace, step: Any) -> dict[str, float]:
    """Time and added memory of one pass over fresh unit-norm features at a scale of 1/0.07."""
    import torch
    from torch.nn.functional import normalize

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(size)
    image, text = (
        normalize(torch.randn(size, args.dim, generator=generator), dim=1)
        .to(args.device, dtype)
        .requires_grad_()
        for _ in range(2)
    )
    logit_scale = torch.tensor(2.6592600369, device=args.device, requires_grad=True)
    memory = CudaMemory() if args.device == "cuda" else ProcessMemory()
    memory.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    step(image, text, logit_scale).backward()
    memory.synchronize()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    result = {"wall_s": wall, "cpu_s": cpu, "added_bytes": memory.added_bytes()}
    if args.device == "cuda":
        result["share_of_matmul_rate"] = 8 * size**2 * args.dim / wall / matmul_rate(size, args.dim)
    return result


class ProcessMemory:
    """Peak resident memory of this process above where it stood (Linux)."""

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
        self._before = self._read("VmRSS")

    def added_bytes(self) -> int:
        return self._read("VmHWM") - self._before

    def synchronize(self) -> None:
        """Nothing is asynchronous."""

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


class CudaMemory:
    """Peak memory of torch's allocator above where it stood."""

    def start(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def added_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self._before

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()


def matmul_rate(size: int, dim: int) -> float:
    """FLOP/s of bf16 products of the shapes that a tile has."""
    import torch

    a, b = (torch.randn(8192, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for repeat in (3, 20):  # the first is a warm-up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            a @ b.T
        torch.cuda.synchronize()
    return repeat * 2 * 8192**2 * dim / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
