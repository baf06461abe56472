"""Bulk image and text embeddings of shards, in clip-retrieval's layout.

    OUT/img_emb/img_emb_0000.npy        (n, D)
    OUT/text_emb/text_emb_0000.npy      (n, D), of each sample's first caption
    OUT/metadata/metadata_0000.parquet  image_path (SHARD/KEY) and caption of the n rows
    OUT/embed.json                      what was embedded by which model: the same command goes on where it
    stopped

Three files a shard, each written whole; the metadata file comes last, says that its shard is done, and keeps
the hash of the shard's content.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from clipstack.checkpoint import load_model
from clipstack.config.models import DataConfig
from clipstack.errors import ConfigError, DataError, ShardError
from clipstack.evaluation.arguments import EMBED_DTYPES
from clipstack.evaluation.data import by_number
from clipstack.evaluation.features import encode_tokens
from clipstack.evaluation.task import Setup, caption_lines
from clipstack.files import write_text
from clipstack.loading.eval_loader import EvalBatch, EvalLoader, ShardSamples
from clipstack.stopping import STOPPED, StopRequest
from clipstack.world import World, joined_world
from data_pipelines.files import replacing
from data_pipelines.index.finding import ensure_summary
from data_pipelines.progress import Progress
from data_pipelines.sources import expand, shard_name
from data_pipelines.stream.quarantine import BadSample

FORMAT = 2
RECORD_FILE = "embed.json"
DIGEST_KEY = b"clipstack.shard_digest"
"""In the metadata file: which content the shard had."""
MIN_DIGITS = 4
FLAGS = {
    "format": "clipstack's version",
    "fingerprint": "--model",
    "dtype": "--dtype",
    "parts": "--only",
    "shards": "--data",
}


@dataclass(frozen=True)
class Plan:
    """What decides every byte of the output; a folder belongs to one plan."""

    format: int
    model: str
    fingerprint: str
    dtype: str
    parts: tuple[str, ...]
    """images, texts or both"""
    shards: tuple[str, ...]
    """file names; the rows of the k-th are in the files numbered k"""


class Done(NamedTuple):
    """One shard's outcome."""

    rows: int
    bad: int
    first_bad: BadSample | None
    is_whole: bool = True
    """False where the shard cannot be read: nothing is written, and the next call tries again."""


def embed(args: argparse.Namespace) -> int:
    """args: of `clipstack.embed`. Returns the exit code. Raises ClipstackError."""
    import pyarrow  # noqa: F401  before the work, not after it: it may be missing

    with joined_world(args.device) as world, torch.no_grad():
        loaded = load_model(args.model, pretrained=args.pretrained, device=world.device)
        setup = Setup(loaded, world, batch_size=args.batch_size, workers=args.workers)
        urls = sorted(expand(args.data), key=by_number)
        parts = ("images", "texts") if args.only is None else (args.only,)
        plan = Plan(
            FORMAT, loaded.name, loaded.fingerprint, args.dtype, parts, tuple(shard_name(url) for url in urls)
        )
        world.from_main(lambda: _claim(args.output, plan, urls))
        stop = StopRequest()
        with stop.listening():
            done = embed_shards(setup, urls, args.output, plan, stop)
            is_stopped = world.any(stop.is_set)
        everyones = [one for ranks in world.gather_objects(done) for one in ranks]
        if world.is_main:
            print(_summary(everyones, args.output))
        if is_stopped:
            print("stopped by signal; the same command goes on from there", file=sys.stderr)
            return STOPPED
    return 0 if all(one.is_whole for one in everyones) else 1


def embed_shards(setup: Setup, urls: list[str], out: Path, plan: Plan, stop: StopRequest) -> list[Done]:
    """Every world.size-th shard that is not done yet. No rank waits for another."""
    world = setup.world
    mine = [k for k in range(len(urls)) if k % world.size == world.rank]
    todo = [k for k in mine if not _files(out, k, len(urls))["metadata"].exists()]
    done = []
    with Progress(f"embed, rank {world.rank}", len(mine), unit="shards") as progress:
        progress.advance(len(mine) - len(todo))
        for k in todo:
            outcome = _embed_shard(setup, urls[k], _files(out, k, len(urls)), plan, stop)
            if outcome is None:
                break
            done.append(outcome)
            progress.advance()
    return done


def _files(out: Path, number: int, num_shards: int) -> dict[str, Path]:
    digits = max(MIN_DIGITS, len(str(num_shards - 1)))
    name = f"{number:0{digits}d}"
    return {
        "images": out / "img_emb" / f"img_emb_{name}.npy",
        "texts": out / "text_emb" / f"text_emb_{name}.npy",
        "metadata": out / "metadata" / f"metadata_{name}.parquet",
    }


def _embed_shard(
    setup: Setup, url: str, files: dict[str, Path], plan: Plan, stop: StopRequest
) -> Done | None:
    """None where a signal came first; nothing is written then."""
    rows = _Rows(setup, plan)
    try:
        summary = ensure_summary(url)
        if summary.num_samples:
            rows.read(url, stop)
    except ShardError as error:
        return Done(0, 1, BadSample(shard_name(url), None, str(error)), is_whole=False)
    if stop.is_set:
        return None
    for part, vectors in rows.vectors.items():
        _write_array(files[part], np.concatenate(vectors), EMBED_DTYPES[plan.dtype])
    _write_metadata(files["metadata"], rows.keys, rows.captions, shard_digest=summary.digest)
    return Done(len(rows.keys), len(rows.bad), rows.bad[0] if rows.bad else None)


class _Rows:
    """The rows of one shard."""

    def __init__(self, setup: Setup, plan: Plan) -> None:
        self._setup = setup
        empty = np.zeros((0, setup.loaded.model.embed_dim), dtype=np.float32)
        self.vectors = {part: [empty] for part in plan.parts}
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.bad: list[BadSample] = []

    def read(self, url: str, stop: StopRequest) -> None:
        setup = self._setup
        config = DataConfig(train=url, max_bad_fraction=1.0)
        loader = EvalLoader(
            ShardSamples((url,), config, captions="required" if "texts" in self.vectors else "optional"),
            config=config,
            preprocess=setup.loaded.preprocess,
            batch_size=setup.batch_size,
            world=World(device=setup.world.device),  # each rank reads its shards by itself
            workers=setup.workers,
        )
        try:
            for batch in loader:
                self._add(batch)
                if stop.is_set:
                    return
        finally:
            loader.close()
        self.bad = loader.bad

    def _add(self, batch: EvalBatch) -> None:
        kept = batch.mask.nonzero()[:, 0].tolist()
        captions = [(caption_lines(batch.captions[row]) or ("",))[0] for row in kept]
        if kept and "images" in self.vectors:
            self.vectors["images"].append(_encode_images(self._setup, batch)[kept])
        if kept and "texts" in self.vectors:
            self.vectors["texts"].append(_encode_texts(self._setup, captions))
        self.keys += [batch.keys[row] for row in kept]
        self.captions += captions


def _encode_images(setup: Setup, batch: EvalBatch) -> npt.NDArray[np.float32]:
    pixels = setup.loaded.preprocess.normalize(batch.images.to(setup.world.device))
    vectors: npt.NDArray[np.float32] = setup.loaded.model.encode_image(pixels).cpu().numpy()
    return vectors


def _encode_texts(setup: Setup, texts: list[str]) -> npt.NDArray[np.float32]:
    tokens = setup.loaded.preprocess.tokenize(texts)
    vectors: npt.NDArray[np.float32] = encode_tokens(setup.loaded.model, tokens, setup.world).cpu().numpy()
    return vectors


def _write_array(path: Path, vectors: npt.NDArray[np.float32], dtype: str) -> None:
    _write_whole(path, lambda file: np.save(file, vectors.astype(dtype)))


def _write_metadata(path: Path, keys: list[str], captions: list[str], *, shard_digest: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.table(
        {"image_path": pa.array(keys, pa.string()), "caption": pa.array(captions, pa.string())}
    ).replace_schema_metadata({DIGEST_KEY: shard_digest})
    _write_whole(path, lambda file: pq.write_table(columns, file))


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The file under its name, complete or not at all. Raises DataError."""
    try:
        with replacing(path) as beside, beside.open("wb") as file:
            write(file)
    except OSError as error:
        raise DataError(
            f"--output {path}: cannot be written ({error.strerror}); finished shards stay: run it again"
        ) from error


def _claim(out: Path, plan: Plan, urls: Sequence[str]) -> None:
    """Note what the folder is for, or check that it is for this. Raises ConfigError, DataError."""
    record = out / RECORD_FILE
    if record.is_file():
        _check_same(record, plan)
        _check_content(out, urls)
        return
    try:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--output {out}: holds other files; name a new or empty folder")
        for folder in ("img_emb", "text_emb", "metadata"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(asdict(plan), indent=1) + "\n")
    except OSError as error:
        raise DataError(f"--output {out}: cannot be written: {error.strerror}") from error


def _check_same(record: Path, plan: Plan) -> None:
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{record}: cannot be read ({error}); take another --output") from error
    now = json.loads(json.dumps(asdict(plan)))
    for name, flag in FLAGS.items():
        if before.get(name) != now[name]:
            raise ConfigError(
                f"{flag}: not what {record} was begun with; give the same to go on, or another --output"
            )


def _check_content(out: Path, urls: Sequence[str]) -> None:
    """Raises ConfigError where a shard that is done had other content: builders give all shards one set of
    names."""
    import pyarrow.parquet as pq

    for number, url in enumerate(urls):
        file = _files(out, number, len(urls))["metadata"]
        if not file.exists():
            continue
        try:
            now = ensure_summary(url).digest
        except ShardError:  # what is done stays, whether the shard is at hand or not
            continue
        try:
            before = (pq.read_schema(file).metadata or {}).get(DIGEST_KEY)
        except (OSError, ValueError) as error:  # Arrow's are ValueErrors
            raise ConfigError(f"{file}: cannot be read ({error}); delete it to make it again") from error
        if before != now.encode():
            raise ConfigError(
                f"--data: {url} is not the shard that {file} was made of; give the same to go on, or another "
                "--output"
            )


def _summary(done: list[Done], out: Path) -> str:
    rows, bad = sum(one.rows for one in done), sum(one.bad for one in done)
    lines = [f"{rows:,} samples of {len(done)} shards embedded in {out}; shards that were done before stay"]
    first = next((one.first_bad for one in done if one.first_bad is not None), None)
    if first is not None:
        where = first.shard if first.key is None else f"{first.shard}/{first.key}"
        lines.append(f"left out: {bad:,}; the first: {where}: {first.reason}")
    return "\n".join(lines)
