"""`clipstack demo`: from nothing to a trained, examined model on a laptop CPU, said in plain words."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipstack.config import load_recipe
from clipstack.recipes import shipped_recipes

if TYPE_CHECKING:
    from torch import Tensor

    from clipstack.checkpoint import LoadedModel
    from clipstack.demo_page import Examined, Example
    from clipstack.demo_probes import Score

NUM_TEST = 1000
NUM_EXAMPLES = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/demo"), help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes to train with (default: %(default)s)")
    parser.add_argument(
        "--train-samples",
        type=int,
        default=30_000,
        help="pictures to draw for training (default: %(default)s)",
    )
    parser.add_argument("--serve", action="store_true", help="serve the model at the end")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values, such as train.steps=100"
    )


def run(args: argparse.Namespace) -> int:
    run_dir: Path = args.dir
    data = run_dir.with_name(run_dir.name + "-data")
    first_dir = run_dir.with_name(run_dir.name + "-first")
    shards = [f"data.train={data}/train-*.tar", f"data.val={data}/val-*.tar"]
    first, first_overrides = (
        shipped_recipes()["demo-first"],
        [f"run.dir={first_dir}", *shards, *args.overrides],
    )
    config = shipped_recipes()["demo"]
    overrides = [f"run.dir={run_dir}", f"model.pretrained={first_dir / 'export'}", *shards, *args.overrides]
    lessons = (load_recipe(first, first_overrides), load_recipe(config, overrides))

    _say(1, f"Drawing {args.train_samples:,} pictures of coloured shapes with captions into {data}")
    _say(0, "Six pairs of colour and shape are kept out of training altogether: the test shows only those.")
    _make_data(data, args.train_samples)

    _say(
        2,
        f"Training a ViT and a text transformer from scratch: DeepSpeed, {args.ranks} processes, this CPU",
    )
    _say(0, "Some minutes. Interrupt it whenever you like: the same command goes on from there.")
    started = time.monotonic()
    _say(
        0,
        f"First lesson, {lessons[0].train.steps:,} steps: of two things, what stands where, by colour alone.",
    )
    code = _train(first, first_overrides, args.ranks)
    if code != 0:
        return code
    _say(0, f"Second lesson, {lessons[1].train.steps:,} steps: whole captions.")
    code = _train(config, overrides, args.ranks)
    if code != 0:
        return code
    minutes = (time.monotonic() - started) / 60

    _say(3, "Examining the model on pictures whose colour and shape never met in training")
    from clipstack.demo_page import write_page

    examined = examine(run_dir / "export", data)
    print(as_table(examined.scores))
    page = write_page(
        run_dir / "report.html", run_dir, examined, lessons, num_pictures=args.train_samples, minutes=minutes
    )

    _say(4, f"Done. Open {page} to see what it learned, as pictures and curves.")
    print(_next_steps(run_dir, data))
    if args.serve:
        return subprocess.call([sys.executable, "-m", "clipstack.cli", "serve", "--model", str(run_dir)])
    return 0


def _say(number: int, line: str) -> None:
    print(f"\n{number}. {line}" if number else f"   {line}", flush=True)


def _make_data(folder: Path, num_train: int) -> None:
    from data_pipelines.shapes import generate

    done = folder / ".done"
    made_with = f"train {num_train} test {NUM_TEST}"
    if not done.is_file() or done.read_text(encoding="utf-8") != made_with:
        generate(folder, num_train=num_train, num_test=NUM_TEST)
        done.write_text(made_with, encoding="utf-8")


def _train(config: Path, overrides: Sequence[str], ranks: int) -> int:
    """`deepspeed clipstack/train.py` as a user would call it."""
    import torch

    launcher = Path(sys.executable).with_name("deepspeed")
    script = Path(__file__).resolve().with_name("train.py")
    threads = max(1, (os.cpu_count() or 1) // ranks)
    quiet = (
        {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    )  # the launcher warns where it finds no GPU
    command = [
        str(launcher), "--quiet", "--num_accelerators", str(ranks), str(script), "--config", str(config),
        *overrides,
    ]  # fmt: skip
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": str(threads), **quiet, **os.environ})
    # Training saves and stops at either signal; a terminal's Ctrl-C reaches it by itself.
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def examine(model_folder: Path, data: Path) -> Examined:
    """Encode the two test splits and every probed text, and ask every probe."""
    import torch

    from clipstack.checkpoint import load_model
    from clipstack.demo_page import Examined
    from clipstack.demo_probes import demo_scores, read_probe_set

    loaded = load_model(model_folder)
    probe_set = read_probe_set(data)
    with torch.inference_mode():
        texts = _encode_texts(loaded, probe_set.texts())
        singles, _ = _encode_images(loaded, data / "single-*.tar")
        doubles, pixels = _encode_images(loaded, data / "test-*.tar")
    scores = demo_scores({**singles, **doubles}, texts, probe_set)
    truth = {probe.image: probe.caption for probe in probe_set.probes}
    return Examined(scores, len(truth), _examples(doubles, pixels, texts, truth))


def _encode_texts(loaded: LoadedModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """text -> (D,) unit-norm"""
    features: dict[str, Tensor] = {}
    for start in range(0, len(texts), 512):
        part = texts[start : start + 512]
        tokens = loaded.model.trim_tokens(loaded.preprocess.tokenize(part))
        features |= dict(zip(part, loaded.model.encode_text(tokens), strict=True))
    return features


def _encode_images(loaded: LoadedModel, shards: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """key -> (D,) unit-norm, and key -> (3, H, W) uint8. Keys as the probe files write them, without the
    shard."""
    from clipstack.config import DataConfig
    from clipstack.loader import EvalLoader, ShardSamples
    from clipstack.world import World

    config = DataConfig(train=str(shards), workers=0)
    loader = EvalLoader(
        ShardSamples([str(shards)], config),
        config=config,
        preprocess=loaded.preprocess,
        batch_size=250,
        world=World(),
    )
    features: dict[str, Tensor] = {}
    pixels: dict[str, Tensor] = {}
    for batch in loader:
        keys = [
            key.rsplit("/", 1)[1] for key, used in zip(batch.keys, batch.mask.tolist(), strict=True) if used
        ]
        images = batch.images[batch.mask]
        encoded = loaded.model.encode_image(loaded.preprocess.normalize(images))
        features |= dict(zip(keys, encoded, strict=True))
        pixels |= dict(zip(keys, images, strict=True))
    return features, pixels


def _examples(
    images: Mapping[str, Tensor],
    pixels: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    truth: Mapping[str, str],
) -> list[Example]:
    """The first test pictures, each with the caption that it is closest to."""
    import torch

    from clipstack.demo_page import Example

    captions = list(truth.values())
    gallery = torch.stack([texts[caption] for caption in captions])  # (N, D)
    return [
        Example(_png(pixels[key]), captions[int((gallery @ images[key]).argmax())], truth[key])
        for key in list(truth)[:NUM_EXAMPLES]
    ]


def _png(pixels: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def as_table(scores: Mapping[str, Score]) -> str:
    """Every score beside chance, for the terminal."""
    from clipstack.demo_page import MEANING

    lines = [f"\n   {'':18}{'accuracy':>9}{'chance':>9}"]
    for name, score in scores.items():
        lines.append(f"   {name:18}{score.accuracy:>9.1%}{score.chance:>9.1%}   {MEANING.get(name, '')}")
    return "\n".join(lines)


def _next_steps(run_dir: Path, data: Path) -> str:
    return f"""
   What to try next
     serve it:            clipstack serve --model {run_dir}
     ask it:              curl http://127.0.0.1:8000/v1/classify -H 'Content-Type: application/json' \\
                            -d '{{"inputs": ["a large red star"], "labels": ["red star", "blue ring"]}}'
     evaluate it again:   clipstack eval --model {run_dir} --data '{data}/val-*.tar' --task zeroshot
     look at the data:    clipstack data stats {data}
     your own pictures:   clipstack data build --help"""
