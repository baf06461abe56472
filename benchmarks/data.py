"""Reads, decodes, loads and builds side by side with the tools that others use, in one run, and prints the
ratios.

    python benchmarks/data.py [--photos SHARD] [--only PART...] [--json OUT]

Peers: webdataset (reading), Pillow + torchvision's classic pipeline (decode and augment), open_clip's
training loader. Every figure is the median of interleaved rounds, on one core but for the whole loaders,
which have two workers each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import clipstack.torchvision_compat  # noqa: E402, F401 - before torchvision

import numpy as np  # noqa: E402 # isort: skip
import open_clip  # noqa: E402 # isort: skip
import torch  # noqa: E402 # isort: skip
import webdataset  # noqa: E402 # isort: skip
from PIL import Image  # noqa: E402 # isort: skip
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor  # noqa: E402 # isort: skip
from torchvision.transforms import functional as F  # noqa: E402 # isort: skip

from clipstack.config.models import AugmentConfig, DataConfig  # noqa: E402
from clipstack.loading.train_loader import TrainLoader  # noqa: E402
from clipstack.preprocess import Preprocess  # noqa: E402
from clipstack.world import World  # noqa: E402
from data_pipelines.cli import main as data_command  # noqa: E402
from data_pipelines.encode import ImageOptions, prepare_image  # noqa: E402
from data_pipelines.images import crop_box, decode  # noqa: E402
from data_pipelines.index import Sample, build_index, write_shard  # noqa: E402
from data_pipelines.order import OrderParams  # noqa: E402
from data_pipelines.stream import Reader, ReadOptions, make_manifest  # noqa: E402

ROUNDS = 5
SIZE = 224
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
AUGMENT = AugmentConfig(crop_scale=(0.9, 1.0))
"""open_clip's own default, so that both loaders crop alike."""
PREPROCESS = Preprocess(image_size=(SIZE, SIZE), mean=MEAN, std=STD, augment=AUGMENT)


def rate(work: Callable[[], int], clock: Callable[[], float]) -> float:
    """Items a second of one call that returns how many it did."""
    began = clock()
    done = work()
    return done / (clock() - began)


def race(
    clock: Callable[[], float] = time.process_time, /, **contestants: Callable[[], int]
) -> dict[str, float]:
    """Median rate of each, in rounds that take turns, so that a busy machine slows all alike.

    Work of one process is timed by its CPU seconds: a rate per core. Whole loaders are timed by the wall
    clock.
    """
    rounds = [{name: rate(work, clock) for name, work in contestants.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in rounds) for name in contestants}


def load_photos(shards: Path) -> list[bytes]:
    """JPEG bytes of every photo; drawn ones where the shard is absent, so that the benchmark always runs."""
    if not shards.exists():
        print(f"{shards}: absent, drawing photo-like pictures instead", file=sys.stderr)
        return [drawn_photo(i) for i in range(160)]
    index = build_index(shards)
    data = shards.read_bytes()
    spans = [index.members(i)["jpg"] for i in range(len(index))]
    return [data[span.offset : span.offset + span.size] for span in spans]


def drawn_photo(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (26, 31, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((464, 390), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(pixels + rng.normal(0, 14, pixels.shape), 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(noisy), quality=92)


def encoded(image: Image.Image, *, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def bench_reading(photos: list[bytes], scratch: Path) -> dict[str, float]:
    """Samples of about 25 KB with caption and JSON, as img2dataset writes them, to (image bytes, caption);
    nothing is decoded.

    Ours come checked and in shuffled order. webdataset is timed shuffling, as it trains, and walking in
    file order; its steps are those of open_clip's pipeline without the decoding.
    """
    small = [encoded(short_side(Image.open(io.BytesIO(p)).convert("RGB"), 256), quality=85) for p in photos]
    folder = scratch / "reading"
    folder.mkdir()
    record = json.dumps(
        {"caption": "a photo", "url": "https://example.org/photo.jpg", "width": 341, "height": 256}
    )
    texts = {"txt": b"a photo of something", "json": record.encode()}
    samples = [Sample(f"{i:06}", {"jpg": small[i % len(small)], **texts}) for i in range(4000)]
    for shard in range(4):
        write_shard(folder / f"{shard:05}.tar", samples[shard * 1000 : (shard + 1) * 1000])
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    manifest = make_manifest([((str(folder),), 1.0)])
    order = manifest.order(OrderParams(seed=1)).take(0, len(samples)).sample.tolist()
    reader = Reader(manifest, ReadOptions())

    def ours() -> int:
        return sum(1 for sample in order if reader.read(sample))

    def pairs(samples: webdataset.WebDataset) -> int:
        named = samples.rename(image="jpg;png;jpeg;webp", text="txt").map_dict(text=bytes.decode)
        return sum(1 for _ in named.to_tuple("image", "text"))

    def walk() -> int:
        return pairs(webdataset.WebDataset(paths, shardshuffle=False))

    def shuffle() -> int:
        return pairs(webdataset.WebDataset(paths, shardshuffle=False).shuffle(5000, initial=1000))

    ours()
    rates = race(ours=ours, shuffle=shuffle, walk=walk)
    return {
        "indexed_read_per_s": rates["ours"],
        "webdataset_shuffled_read_per_s": rates["shuffle"],
        "webdataset_walk_per_s": rates["walk"],
        "indexed_read_ratio": rates["ours"] / rates["shuffle"],
        "indexed_read_ratio_to_walk": rates["ours"] / rates["walk"],
        "mean_image_kb": statistics.mean(map(len, small)) / 1000,
    }


def short_side(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def bench_decoding(photos: list[bytes]) -> dict[str, float]:
    """One core: bytes to what goes to the device, against Pillow + RandomResizedCrop + ToTensor +
    Normalize."""
    classic = open_clip.image_transform(
        SIZE, is_train=True, mean=MEAN, std=STD, aug_cfg={"scale": AUGMENT.crop_scale}
    )

    def ours() -> int:
        return len([PREPROCESS.train_image(decode(data), random.Random(i)) for i, data in enumerate(photos)])

    def theirs() -> int:
        return len([classic(Image.open(io.BytesIO(data)).convert("RGB")) for data in photos])

    rates = race(ours=ours, theirs=theirs)
    return {
        "decode_augment_per_s": rates["ours"],
        "pillow_decode_augment_per_s": rates["theirs"],
        "decode_augment_ratio": rates["ours"] / rates["theirs"],
        "decode_augment_psnr_db": psnr(photos),
    }


def psnr(photos: list[bytes]) -> float:
    """Of our normalised training images against the classic pipeline's under the same crops, on the 0 to
    255 scale."""
    to_tensor = Compose([ToTensor(), Normalize(MEAN, STD)])
    errors = []
    for i, data in enumerate(photos):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = crop_box(*image.size, scale=AUGMENT.crop_scale, ratio=AUGMENT.crop_ratio, rng=random.Random(i))
        reference = to_tensor(
            F.resized_crop(image, *box, [SIZE, SIZE], interpolation=InterpolationMode.BICUBIC)
        )
        ours = PREPROCESS.normalize(PREPROCESS.train_image(decode(data), random.Random(i)))
        scale = 255 * torch.tensor(STD).view(3, 1, 1)
        errors.append(float((((ours - reference) * scale) ** 2).mean()))
    return float(10 * np.log10(255**2 / np.mean(errors)))


def bench_loaders(photos: list[bytes], scratch: Path) -> dict[str, float]:
    """Whole loaders with two workers: shards to batches of 64 in the main process, ours normalised there
    too."""
    folder = scratch / "loading"
    folder.mkdir()
    for shard in range(8):
        rows = [
            Sample(f"{shard:02}{i:04}", {"jpg": data, "txt": b"a photo"}) for i, data in enumerate(photos)
        ]
        write_shard(folder / f"{shard:05}.tar", rows)
    count = 8 * len(photos)
    rates = race(
        time.perf_counter,
        ours=lambda: counted(our_batches(folder), count),
        theirs=lambda: counted(open_clip_batches(folder, count), count),
    )
    return {
        "loader_per_s": rates["ours"],
        "open_clip_loader_per_s": rates["theirs"],
        "loader_ratio": rates["ours"] / rates["theirs"],
    }


def counted(batches: Iterator[int], limit: int) -> int:
    done = 0
    for size in batches:
        done += size
        if done >= limit - 64:
            break
    return done


def our_batches(folder: Path) -> Iterator[int]:
    config = DataConfig(train=str(folder), workers=2, augment=AUGMENT)
    loader = TrainLoader(
        config, preprocess=PREPROCESS, batch_size=64, world=World(), seed=1, quarantine_path=None
    )
    for batch in loader.iterate(0):
        yield len(PREPROCESS.normalize(batch.images))
    loader.close()


def open_clip_batches(folder: Path, count: int) -> Iterator[int]:
    import open_clip_train.data as peer
    from webdataset.tariterators import tar_file_expander

    # Newer webdataset marks the end of each shard, which open_clip's own grouping of members does not expect.
    peer.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    args = Namespace(
        train_data=str(folder / "{00000..00007}.tar"),
        train_num_samples=count,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=1,
        batch_size=64,
        world_size=1,
        workers=2,
    )
    transform = open_clip.image_transform(
        SIZE, is_train=True, mean=MEAN, std=STD, aug_cfg={"scale": AUGMENT.crop_scale}
    )
    data = peer.get_wds_dataset(args, transform, True, tokenizer=open_clip.SimpleTokenizer())
    for images, _ in data.dataloader:
        yield len(images)


def bench_building(photos: list[bytes], scratch: Path) -> dict[str, float]:
    """`clipstack data build` on one process, and the share of its time that decoding, shrinking and
    encoding take."""
    source = scratch / "pictures"
    source.mkdir()
    for i, data in enumerate(photos):
        (source / f"{i:04}.jpg").write_bytes(data)
        (source / f"{i:04}.txt").write_text("a photo of something")
    runs = iter(range(1000))

    def build() -> int:
        out = scratch / f"built-{next(runs)}"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = data_command(["build", str(source), "-o", str(out), "--processes", "1"])
        assert code == 0
        return len(photos)

    def encode_only() -> int:
        return len([prepare_image(data, ImageOptions()) for data in photos])

    build()
    rates = race(build=build, encode=encode_only)
    return {
        "build_per_s_per_core": rates["build"],
        "build_share_of_decode_and_encode": rates["build"] / rates["encode"],
    }


def bench_order() -> dict[str, float]:
    """What the order itself costs, far inside a data set of 400 million samples."""
    from data_pipelines.order import Order

    order = Order([[10_000] * 40_000], [1.0], OrderParams(seed=1, lanes=16, window_shards=8))
    began = time.perf_counter()
    order.take(250_000_000, 4096)
    cold = time.perf_counter() - began

    def batches() -> int:
        return sum(len(order.take(start, 4096).sample) for start in range(250_004_096, 250_400_000, 4096))

    return {"order_ids_per_s": rate(batches, time.process_time), "order_cold_seek_s": cold}


TARGETS = {
    "indexed_read_ratio": 8.0,
    "decode_augment_ratio": 1.8,
    "decode_augment_psnr_db": 60.0,
    "loader_ratio": 1.7,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--photos", type=Path, default=ROOT / "../shared/data/photos/photos-00000.tar", help="one shard"
    )
    parser.add_argument("--only", nargs="+", choices=("order", "reading", "decoding", "loading", "building"))
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    assert importlib.util.find_spec("simplejpeg"), (
        "the figures are those of the fast path: pip install simplejpeg"
    )
    torch.set_num_threads(1)
    photos = load_photos(args.photos)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "order": bench_order,
            "reading": lambda: bench_reading(photos, scratch),
            "decoding": lambda: bench_decoding(photos),
            "loading": lambda: bench_loaders(photos, scratch),
            "building": lambda: bench_building(photos, scratch),
        }
        for part in args.only or parts:
            for name, value in parts[part]().items():
                figures[name] = value
                target = f"  (wanted: {TARGETS[name]:g} or more)" if name in TARGETS else ""
                print(f"{name:36} {value:12.2f}{target}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
