"""The torch runtime: a model loaded by `clipstack`, on CPU or CUDA, accepted only if its vectors pass the
gate.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from clipstack.checkpoint import LoadedModel, load_model
from clipstack.errors import ConfigError
from clipstack.model import ClipModel
from clipstack.preprocess import Preprocess

import numpy as np  # isort: skip
import torch  # isort: skip
from open_clip.tokenizer import SimpleTokenizer  # isort: skip
from PIL import Image  # isort: skip
from torch import Tensor  # isort: skip
from torchvision.transforms import InterpolationMode  # isort: skip
from torchvision.transforms.v2 import functional as F  # isort: skip

from serve.bpe import BoundedBpe
from serve.errors import ErrorCode, ServeError
from serve.gate import GATE_IMAGES, GATE_TEXTS, centred_cosine, passes
from serve.runtime import (
    CROWD,
    Float32,
    Gate,
    ModelInfo,
    Runtime,
    RuntimeLoader,
    SelfTestError,
    TokenIds,
    Tokens,
    UInt8,
    available_cores,
)
from serve.settings import ModelSpec, Settings

logger = logging.getLogger("serve")

MAX_ASPECT = 16  # a longer picture loses what the centre crop would cut off anyway, before it is enlarged
TIMED_BATCH = 8
BF16_MUST_GAIN = 1.2  # how much faster bfloat16 must be to be chosen by "auto"


def loader_of(spec: ModelSpec, settings: Settings) -> RuntimeLoader:
    """A function that loads the model of `spec`; it may be called again to reload."""
    return partial(load_runtime, spec, settings)


def load_runtime(spec: ModelSpec, settings: Settings) -> Runtime:
    """Raises ConfigError or CheckpointError for what cannot be loaded, SelfTestError below the gate."""
    if (
        spec.pretrained is not None
        and Path(spec.pretrained).is_file()
        and not spec.pretrained.endswith(".safetensors")
    ):
        raise ConfigError(
            f"pretrained = {spec.pretrained!r}: only safetensors files are served, since others can "
            "run code; convert it first"
        )
    device = choose_device(settings.device)
    loaded = load_model(spec.source, pretrained=spec.pretrained, device=device)
    if loaded.is_random and not settings.allow_random_weights:
        raise ConfigError(
            f"models = {spec.source!r}: this architecture without pretrained weights answers at random; "
            "name weights with --pretrained, a run or an exported folder; "
            "for a load test pass --allow-random-weights"
        )
    return build_runtime(loaded, settings, device=device)


def choose_device(wanted: str) -> torch.device:
    """Raises ConfigError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {wanted!r}: cannot be used here; take cpu or auto") from error
    return device


def build_runtime(loaded: LoadedModel, settings: Settings, *, device: torch.device) -> TorchRuntime:
    """The fastest engine that the settings allow and the gate accepts. Raises SelfTestError where none is."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: the patch embedding is a convolution
    reference = _Reference.of(loaded, device)
    runtime = TorchRuntime(
        loaded, device=device, threads=settings.device_threads, preprocess=settings.preprocess
    )
    gate = reference.gate_of(runtime)
    if not passes(gate, "float32") and settings.preprocess == "fast":
        logger.warning("fast preprocessing fails the gate, taking exact", extra={"gate": gate.image})
        runtime = TorchRuntime(loaded, device=device, threads=settings.device_threads, preprocess="exact")
        gate = reference.gate_of(runtime)
    runtime.accept(_checked(gate, "float32"))
    if settings.dtype == "float32":
        return runtime
    return _in_bfloat16(runtime, reference, forced=settings.dtype == "bfloat16")


def _checked(gate: Gate, dtype: str) -> Gate:
    if not passes(gate, dtype):
        raise SelfTestError(
            f"gate: vectors in {dtype} are too far from the reference (centred cosine of images "
            f"{gate.image:.6f}, of texts {gate.text:.6f}); choose another dtype or preprocess"
        )
    return gate


def _in_bfloat16(runtime: TorchRuntime, reference: _Reference, *, forced: bool) -> TorchRuntime:
    """The same model in bfloat16 where that is asked for, or faster; timed, since CPU flags do not tell."""
    slow_s = _time_batch(runtime)
    candidate = runtime.in_bfloat16()
    fast_s = _time_batch(candidate)
    gate = reference.gate_of(candidate)
    logger.info("bfloat16 timed", extra={"float32_s": slow_s, "bfloat16_s": fast_s, "gate": gate.image})
    if forced:
        candidate.accept(_checked(gate, "bfloat16"))
        return candidate
    if slow_s < BF16_MUST_GAIN * fast_s or not passes(gate, "bfloat16"):
        return runtime
    candidate.accept(gate)
    return candidate


def _time_batch(runtime: TorchRuntime) -> float:
    """Seconds of a forward pass of images, the best of three after one to warm up."""
    images = [runtime.prepare_image(GATE_IMAGES[0])] * TIMED_BATCH
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        runtime.encode_images(images)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


@dataclass(frozen=True)
class _Reference:
    """What open_clip's own forward gives in float32 for the gate's inputs."""

    images: Float32
    texts: Float32

    @classmethod
    def of(cls, loaded: LoadedModel, device: torch.device) -> _Reference:
        pixels = torch.stack([loaded.preprocess.eval_image(Image.fromarray(image)) for image in GATE_IMAGES])
        tokens = loaded.tokenizer(list(GATE_TEXTS))
        towers = loaded.model.towers
        with torch.inference_mode():
            return cls(
                _rows(towers.encode_image(pixels.to(device), normalize=True)),
                _rows(towers.encode_text(tokens.to(device), normalize=True)),
            )

    def gate_of(self, runtime: TorchRuntime) -> Gate:
        images = runtime.encode_images([runtime.prepare_image(image) for image in GATE_IMAGES])
        texts = runtime.encode_texts([runtime.tokenize(text, truncate=True).ids for text in GATE_TEXTS])
        return Gate(image=centred_cosine(images, self.images), text=centred_cosine(texts, self.texts))


class TorchRuntime:
    """One model on one device. See `serve.runtime.Runtime` for the methods."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: torch.device,
        threads: int = 0,
        preprocess: Literal["fast", "exact"] = "fast",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._loaded = loaded
        self._device = device
        self._threads = threads or available_cores()
        self._preprocess = preprocess
        self._dtype = dtype
        self._model: ClipModel = loaded.model.to(dtype)
        self._thread = _ThreadSettings()
        self._tokenize = _tokenize_with(loaded)
        self._sized = _sizer_of(loaded.preprocess, preprocess)
        self.info = _info_of(loaded, device, preprocess)

    def accept(self, gate: Gate) -> None:
        """Record the gate that this engine passed."""
        self.info = replace(self.info, gate=gate)

    def in_bfloat16(self) -> TorchRuntime:
        """A copy of this model in bfloat16; this one stays as it is.

        Other arithmetic gives other vectors, so it has another fingerprint: stores of vectors must not mix
        the two.
        """
        apart = replace(self._loaded, model=copy.deepcopy(self._loaded.model))
        twin = TorchRuntime(
            apart,
            device=self._device,
            threads=self._threads,
            preprocess=self._preprocess,
            dtype=torch.bfloat16,
        )
        fingerprint = f"{self.info.fingerprint}-bfloat16"
        twin.info = replace(self.info, fingerprint=fingerprint, dtype="bfloat16", gate=None)
        return twin

    def tokenize(self, text: str, *, truncate: bool) -> Tokens:
        return self._tokenize(text, truncate)

    def prepare_image(self, pixels: UInt8) -> UInt8:
        self._thread.use(1)  # images are decoded side by side: one thread each
        return self._sized(_without_extremes(pixels))

    @torch.inference_mode()
    def encode_images(self, images: Sequence[UInt8]) -> Float32:
        with CROWD.batch(self._threads) as threads:
            self._thread.use(threads)
            batch = torch.from_numpy(np.stack(images)).to(self._device, non_blocking=True)  # (N, 3, H, W)
            normal = self._loaded.preprocess.normalize(batch).to(self._dtype)
            return _rows(self._model.encode_image(normal))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[TokenIds]) -> Float32:
        batch = np.zeros((len(texts), max(len(ids) for ids in texts)), dtype=np.int64)  # (N, longest)
        for row, ids in zip(batch, texts, strict=True):
            row[: len(ids)] = ids
        with CROWD.batch(self._threads) as threads:
            self._thread.use(threads)
            return _rows(self._model.encode_text(torch.from_numpy(batch).to(self._device, non_blocking=True)))


class _ThreadSettings(threading.local):
    """torch's number of threads belongs to the calling thread; set it once in each."""

    current = 0

    def use(self, num_threads: int) -> None:
        if self.current != num_threads:
            torch.set_num_threads(num_threads)
            self.current = num_threads


def _rows(vectors: Tensor) -> Float32:
    rows: Float32 = vectors.float().cpu().numpy()
    return rows


def _info_of(loaded: LoadedModel, device: torch.device, preprocess: str) -> ModelInfo:
    model = loaded.model
    bias = model.towers.logit_bias
    return ModelInfo(
        fingerprint=loaded.fingerprint,
        dimensions=model.embed_dim,
        context_length=loaded.preprocess.context_length,
        image_size=loaded.preprocess.image_size,
        probabilities="softmax" if bias is None else "sigmoid",
        logit_scale=float(model.bounded_logit_scale().float().exp()),
        logit_bias=0.0 if bias is None else float(bias),
        engine=f"torch {torch.__version__}, {preprocess} preprocessing",
        device=str(device),
        dtype="float32",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _without_extremes(pixels: UInt8) -> UInt8:
    """Cut a very long picture to the middle that the centre crop looks at: enlarged whole, it could fill the
    memory.
    """
    height, width = pixels.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return pixels[top : top + longest, left : left + longest]


def _sizer_of(preprocess: Preprocess, how: Literal["fast", "exact"]) -> Callable[[UInt8], UInt8]:
    """(H, W, 3) -> (3, height, width), as the model was trained. Fast exists for what CLIP models use."""
    modes = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
    height, width = preprocess.image_size
    is_common = preprocess.resize_mode == "shortest" and height == width and preprocess.interpolation in modes
    if how == "fast" and is_common:
        return partial(_resize_and_crop, side=height, mode=modes[preprocess.interpolation])
    return partial(_as_trained, preprocess=preprocess)


def _as_trained(pixels: UInt8, *, preprocess: Preprocess) -> UInt8:
    sized: UInt8 = preprocess.eval_pixels(Image.fromarray(pixels)).numpy()
    return sized


def _resize_and_crop(pixels: UInt8, *, side: int, mode: InterpolationMode) -> UInt8:
    """Shorter edge to `side`, centre cropped: open_clip's transform, with torchvision's integer resize for
    Pillow's.
    """
    # Permuted, not copied: the integer resize is fastest on channels-last memory.
    image = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(
        2, 0, 1
    )  # (3, H, W)
    height, width = pixels.shape[:2]
    short = min(height, width)
    size = [int(side * height / short), int(side * width / short)]
    if short != side:
        image = F.resize_image(image, size, interpolation=mode, antialias=True)
    top, left = round((image.shape[1] - side) / 2), round((image.shape[2] - side) / 2)
    sized: UInt8 = image[:, top : top + side, left : left + side].contiguous().numpy()
    return sized


def _tokenize_with(loaded: LoadedModel) -> Callable[[str, bool], Tokens]:
    """How a text becomes ids, chosen once by the kind of tokenizer that the model came with."""
    context_length = loaded.preprocess.context_length
    blank = torch.zeros((1, context_length), dtype=torch.int64)
    can_trim = loaded.model.trim_tokens(blank).shape[1] < context_length
    if isinstance(loaded.tokenizer, SimpleTokenizer) and loaded.tokenizer.reduction_fn is None:
        return _SimpleTokens(loaded.tokenizer, context_length, can_trim=can_trim)
    return _WrappedTokens(loaded.tokenizer, context_length)


class _SimpleTokens:
    """open_clip's own tokenizer."""

    def __init__(self, tokenizer: Any, context_length: int, *, can_trim: bool) -> None:
        self._bpe = BoundedBpe(tokenizer)
        self._start, self._end = tokenizer.sot_token_id, tokenizer.eot_token_id
        self._context_length = context_length
        self._can_trim = can_trim

    def __call__(self, text: str, truncate: bool) -> Tokens:
        words = self._bpe.encode(text)
        room = self._context_length - 2
        if len(words) > room and not truncate:
            raise too_long(len(words) + 2, self._context_length)
        ids = [self._start, *words[:room], self._end]
        padding = 0 if self._can_trim else self._context_length - len(ids)
        return Tokens(
            np.array(ids + [0] * padding, dtype=np.int64), count=len(ids), was_cut=len(words) > room
        )


class _WrappedTokens:
    """A tokenizer of the Hugging Face library behind open_clip's HFTokenizer: its rows are padded already."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._lock = threading.Lock()  # such a tokenizer keeps its padding and truncation as state

    def __call__(self, text: str, truncate: bool) -> Tokens:
        with self._lock:
            count = len(self._tokenizer.tokenizer(self._tokenizer.clean_fn(text)).input_ids)
            row = self._tokenizer([text])[0]
        if count > self._context_length and not truncate:
            raise too_long(count, self._context_length)
        cut = count > self._context_length
        return Tokens(row.numpy().astype(np.int64), count=min(count, self._context_length), was_cut=cut)


def too_long(count: int, context_length: int) -> ServeError:
    message = f"the text has {count} tokens and the model reads {context_length}"
    message += '; shorten it or send "truncate": true'
    return ServeError(ErrorCode.TEXT_TOO_LONG, message)
