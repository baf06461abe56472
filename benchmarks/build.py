"""How fast `clipstack data build` is, and how much of its time is decoding and encoding alone.

    python benchmarks/build.py [--data SHARDS] [--repeat N] [--json FILE]

Three measurements of the same photos, in one run, on one core (and the build on two processes as well): the
whole build (read, check, shrink, encode, hashes, table, index, tar, sync to disk), the loop of decode, shrink
and encode that any builder must do, and decode, shrink and encode as a plain Pillow script does them.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data_pipelines.building.plan import BuildOptions, plan_jobs
from data_pipelines.building.run import run_jobs
from data_pipelines.encode import ImageOptions, prepare_image, shrunk_size
from data_pipelines.inputs.collecting import collect
from data_pipelines.inputs.items import InputOptions
from data_pipelines.inputs.reading import read_item
from data_pipelines.inputs.shards import expand_shards, shard_items
from data_pipelines.parallel import default_processes

PHOTOS = Path(__file__).resolve().parents[1] / "../shared/data/photos"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default=str(PHOTOS), help="shards of photos (default: ../shared/data/photos)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default: 3)")
    parser.add_argument(
        "--copies", type=int, default=2, help="of each photo, to make the runs longer (default: 2)"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not Path(args.data).exists():
        print(f"error: {args.data}: no such shards; name some with --data", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(args.data, Path(scratch), repeat=args.repeat, copies=args.copies)
    for name, value in result.items():
        print(f"{name:<40}{value:>12,.3f}" if isinstance(value, float) else f"{name:<40}{value:>12,}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2))
    return 0


def measure(data: str, scratch: Path, *, repeat: int, copies: int) -> dict[str, float | int]:
    images = [read_item(item).image for item in shard_items(expand_shards([data])).items] * copies
    folder = scratch / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i:05d}.jpg").write_bytes(image)
        (folder / f"{i:05d}.txt").write_text(f"photo number {i}")
    options = ImageOptions()
    rounds: dict[str, list[float]] = {"build": [], "build, wall": [], "pure": [], "pillow": [], "two": []}
    build(folder, scratch / "warm", processes=1)  # the first run pays for imports and cold files
    for _ in range(repeat):
        # Taken in turn, so that a busy moment of the machine meets all of them.
        rounds["pure"].append(seconds(lambda: [prepare_image(image, options) for image in images]))
        rounds["pillow"].append(seconds(lambda: [plain_pillow(image) for image in images]))
        begin = time.perf_counter()
        rounds["build"].append(seconds(lambda: build(folder, scratch / "out", processes=1)))
        rounds["build, wall"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        build(folder, scratch / "out", processes=2)
        rounds["two"].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in rounds.items()}
    count = len(images)
    return {
        "images": count,
        "mean input KB": sum(map(len, images)) / count / 1000,
        "build, images/s/core": count / median["build"],
        "build, images/s (1 process, wall)": count / median["build, wall"],
        "build, images/s (2 processes, wall)": count / median["two"],
        "cores": default_processes(),
        "decode + shrink + encode, images/s/core": count / median["pure"],
        "plain Pillow script, images/s/core": count / median["pillow"],
        "share of pure decode + encode in build": median["pure"] / median["build"],
        "build / plain Pillow script": median["pillow"] / median["build"],
    }


def build(folder: Path, out: Path, *, processes: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    options = BuildOptions(samples_per_shard=100)
    inputs = collect([str(folder)], InputOptions())
    run_jobs(plan_jobs(inputs.items, options), out, options, inputs=inputs, processes=processes)


def plain_pillow(data: bytes) -> bytes:
    """What a script does that knows no tricks: full decode, shrink, encode."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.resize(shrunk_size(*image.size, 256), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def seconds(function: Callable[[], object]) -> float:
    """Processor time of this process."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
