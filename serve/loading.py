"""How a model is loaded to be served: from its source to the fastest engine that the settings allow and whose
vectors pass the gate.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from clipstack.checkpoint import LoadedModel, load_model
from clipstack.errors import ConfigError

import numpy as np  # isort: skip
import torch  # isort: skip
from PIL import Image  # isort: skip

from serve.gate import GATE_IMAGES, GATE_TEXTS, centred_cosine, passes
from serve.inputs import Inputs
from serve.openvino_runtime import (
    OpenVinoMissingError,
    OpenVinoRuntime,
    UnconvertibleError,
    import_openvino,
)
from serve.runtime import CROWD, Float32, Gate, Runtime, RuntimeLoader, SelfTestError, TokenIds
from serve.settings import ModelSpec, Settings
from serve.torch_runtime import TorchRuntime, rows_of

logger = logging.getLogger("serve")

TIMED_BATCHES = (1, 8)
TIMED_ROUNDS = 4
TIMED_FOR_S = 1.0  # no further round of a batch size after this long
MIDDLE_LENGTH = 40  # tokens: between the gate's texts and CLIP's 77
MOST_APART = 1e-5  # between the vectors of two engines that have one fingerprint
BF16_MUST_GAIN = 1.2  # how much faster bfloat16 must be to be chosen by "auto"


class Engine(Runtime, Protocol):
    """A runtime that can be compared with others."""

    def accept(self, gate: Gate) -> None:
        """Record the gate that this engine passed."""
        ...


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
    check_engine(settings, device)
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


def check_engine(settings: Settings, device: torch.device) -> None:
    """Raises ConfigError for an engine that was asked for and cannot do what else was asked for."""
    if settings.engine != "openvino":
        return
    import_openvino()  # what is missing is said before anything is loaded
    if device.type != "cpu":
        raise ConfigError(
            f"engine = 'openvino': computes on the CPU alone and the device is {device}; "
            "add --device cpu, or take --engine torch"
        )
    if settings.dtype == "bfloat16":
        raise ConfigError(
            "engine = 'openvino': computes in float32 and dtype is bfloat16; take --dtype float32, "
            "or --engine torch"
        )


def build_runtime(loaded: LoadedModel, settings: Settings, *, device: torch.device) -> Engine:
    """The fastest engine that the settings allow and the gate accepts.

    Raises SelfTestError where none is, ConfigError where the one that was asked for cannot be had.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: the patch embedding is a convolution
    reference = _Reference.of(loaded, device)
    plain, inputs = _torch_in_float32(loaded, reference, settings, device)
    found: list[Engine] = []
    if settings.engine != "torch" and settings.dtype != "bfloat16" and device.type == "cpu":
        found += _openvino(loaded, inputs, reference, plain, settings)
    if settings.engine != "openvino" and settings.dtype != "bfloat16":
        found.append(plain)
    if settings.engine != "openvino" and settings.dtype != "float32":
        found += _torch_in_bfloat16(plain, reference, forced=settings.dtype == "bfloat16")
    return _fastest(found)


def _torch_in_float32(
    loaded: LoadedModel, reference: _Reference, settings: Settings, device: torch.device
) -> tuple[TorchRuntime, Inputs]:
    """Every engine is given what this one was accepted with. Raises SelfTestError."""
    inputs = Inputs(loaded, settings.preprocess)
    runtime = TorchRuntime(loaded, inputs, device=device, threads=settings.device_threads)
    gate = reference.gate_of(runtime)
    if not passes(gate, "float32") and settings.preprocess == "fast":
        logger.warning("fast preprocessing fails the gate, taking exact", extra={"gate": gate.image})
        inputs = Inputs(loaded, "exact")
        runtime = TorchRuntime(loaded, inputs, device=device, threads=settings.device_threads)
        gate = reference.gate_of(runtime)
    runtime.accept(_checked(gate, "float32"))
    return runtime, inputs


def _torch_in_bfloat16(plain: TorchRuntime, reference: _Reference, *, forced: bool) -> list[Engine]:
    """The same model in bfloat16. Where it fails the gate: none, or SelfTestError where it was asked for."""
    engine = plain.in_bfloat16()
    gate = reference.gate_of(engine)
    if not forced and not passes(gate, "bfloat16"):
        logger.info("bfloat16 not taken", extra={"reason": "it fails the gate", "gate": gate.image})
        return []
    engine.accept(_checked(gate, "bfloat16"))
    return [engine]


def _openvino(
    loaded: LoadedModel, inputs: Inputs, reference: _Reference, plain: TorchRuntime, settings: Settings
) -> list[Engine]:
    """The same model compiled by OpenVINO. Where that fails: none, or an error where it was asked for."""
    try:
        engine = _openvino_that_passes(loaded, inputs, reference, plain, settings)
    except (OpenVinoMissingError, UnconvertibleError, SelfTestError) as error:
        if settings.engine == "openvino":
            raise
        level = logging.INFO if isinstance(error, OpenVinoMissingError) else logging.WARNING
        logger.log(level, "openvino not taken", extra={"reason": str(error)})
        return []
    return [engine]


def _openvino_that_passes(
    loaded: LoadedModel, inputs: Inputs, reference: _Reference, plain: TorchRuntime, settings: Settings
) -> OpenVinoRuntime:
    """Raises UnconvertibleError, and SelfTestError for vectors that are not the plain engine's."""
    engine = OpenVinoRuntime(loaded, inputs, threads=settings.device_threads, lanes=settings.device_lanes)
    try:
        engine.accept(_checked(reference.gate_of(engine), "float32"))
        for others in (0, settings.device_lanes - 1):  # alone, then as one of several: two compiled forms
            with ExitStack() as lanes:
                for _ in range(others):
                    lanes.enter_context(CROWD.batch(1))
                _check_equal(engine, plain, inputs)
    except (RuntimeError, ValueError, LookupError, MemoryError) as error:
        # Such as a size that was written into the graph.
        raise UnconvertibleError.because(error) from error
    return engine


def _check_equal(engine: OpenVinoRuntime, plain: TorchRuntime, inputs: Inputs) -> None:
    """Both have one fingerprint, so their vectors must be equal: for one input and for several, for texts of
    all lengths. Raises SelfTestError.
    """
    images = [inputs.prepare_image(picture) for picture in GATE_IMAGES[:3]]
    texts = [inputs.tokenize(text, truncate=True).ids for text in GATE_TEXTS]
    if inputs.can_trim:
        longest, most = max(texts, key=len), engine.info.context_length
        texts += [_of_length(longest, length) for length in {min(MIDDLE_LENGTH, most), most}]
    pairs = [
        (engine.encode_images(images), plain.encode_images(images)),
        (engine.encode_images(images[:1]), plain.encode_images(images[:1])),
        (engine.encode_texts(texts), plain.encode_texts(texts)),
        *((engine.encode_texts([ids]), plain.encode_texts([ids])) for ids in texts),
    ]
    apart = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
    if not all(np.isfinite(ours).all() for ours, _ in pairs) or apart > MOST_APART:
        raise SelfTestError(
            f"engine = 'openvino': its vectors differ from torch's by up to {apart:.1g}, more than "
            f"{MOST_APART:g}; take --engine torch"
        )


def _of_length(ids: TokenIds, length: int) -> TokenIds:
    """A text's tokens with its words cut or repeated, between the same start and end."""
    return np.concatenate([ids[:1], np.resize(ids[1:-1], max(0, length - 2)), ids[-1:]])


def _checked(gate: Gate, dtype: str) -> Gate:
    if not passes(gate, dtype):
        raise SelfTestError(
            f"gate: vectors in {dtype} are too far from the reference (centred cosine of images "
            f"{gate.image:.6f}, of texts {gate.text:.6f}); choose another engine, dtype or preprocess"
        )
    return gate


def _fastest(engines: Sequence[Engine]) -> Engine:
    """Timed, since CPU flags do not tell. Equals: the first. bfloat16 must be faster by BF16_MUST_GAIN."""
    if len(engines) == 1:
        return engines[0]
    seconds = _time(engines)
    named = {
        f"{engine.info.engine.split()[0]} {engine.info.dtype}": round(taken, 4)
        for engine, taken in zip(engines, seconds, strict=True)
    }
    handicaps = [BF16_MUST_GAIN if engine.info.dtype == "bfloat16" else 1.0 for engine in engines]
    ranked = [taken * handicap for taken, handicap in zip(seconds, handicaps, strict=True)]
    best = engines[ranked.index(min(ranked))]
    logger.info(
        "engines timed", extra={"engine": best.info.engine, "dtype": best.info.dtype, "seconds": named}
    )
    return best


def _time(engines: Sequence[Engine]) -> list[float]:
    """Seconds of each engine for one batch of each of TIMED_BATCHES images, the best of a few rounds.

    They take turns, so that what else the machine does meets them all.
    """
    seconds = [0.0] * len(engines)
    for size in TIMED_BATCHES:
        best, until = [math.inf] * len(engines), time.perf_counter() + TIMED_FOR_S
        batches = [[engine.prepare_image(GATE_IMAGES[0])] * size for engine in engines]
        for _ in range(TIMED_ROUNDS):
            for index, (engine, batch) in enumerate(zip(engines, batches, strict=True)):
                started = time.perf_counter()
                engine.encode_images(batch)
                best[index] = min(best[index], time.perf_counter() - started)
            if time.perf_counter() > until:
                break
        seconds = [total + taken for total, taken in zip(seconds, best, strict=True)]
    return seconds


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
                rows_of(towers.encode_image(pixels.to(device), normalize=True)),
                rows_of(towers.encode_text(tokens.to(device), normalize=True)),
            )

    def gate_of(self, runtime: Runtime) -> Gate:
        images = runtime.encode_images([runtime.prepare_image(image) for image in GATE_IMAGES])
        texts = runtime.encode_texts([runtime.tokenize(text, truncate=True).ids for text in GATE_TEXTS])
        return Gate(image=centred_cosine(images, self.images), text=centred_cosine(texts, self.texts))
