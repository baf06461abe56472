"""The OpenVINO engine: both towers compiled from the loaded torch model, on CPU, in float32. The package is
imported when the engine is made, and not before.
"""

from __future__ import annotations

import gc
import importlib
import math
import sys
import threading
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from clipstack.checkpoint import LoadedModel
from clipstack.errors import ClipstackError, ConfigError, how_to_install, how_to_reinstall
from clipstack.model import ClipModel
from clipstack.preprocess import Preprocess

import numpy as np  # isort: skip
import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from serve.inputs import Inputs, info_of, padded
from serve.runtime import CROWD, Float32, Gate, ModelInfo, TokenIds, Tokens, UInt8, available_cores

# What a batch of a new shape needs is prepared when it is first seen, which takes longer than to compute a
# small one. So texts are padded to a few lengths; the padding is never read.
TEXT_STEP = 8

_TRACING = threading.Lock()  # torch keeps what it traces in one place for all threads


class OpenVinoMissingError(ConfigError):
    """The package is not installed, or cannot be imported."""


class UnconvertibleError(ClipstackError):
    """A tower that OpenVINO cannot take over."""

    @classmethod
    def because(cls, error: Exception) -> UnconvertibleError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        return cls(f"engine = 'openvino': cannot take over this model ({reason:.200}); take --engine torch")


@dataclass(frozen=True)
class Cores:
    """What the forward passes of one model may use."""

    threads: int
    lanes: int

    @property
    def share(self) -> int:
        """Threads of a forward pass beside others."""
        return max(1, self.threads // self.lanes)


class OpenVinoRuntime:
    """One model on the CPU. See `serve.runtime.Runtime` for the methods."""

    def __init__(self, loaded: LoadedModel, inputs: Inputs, *, threads: int = 0, lanes: int = 1) -> None:
        """lanes: batches that may run side by side. Raises OpenVinoMissingError, UnconvertibleError."""
        ov = import_openvino()
        preprocess, cores = loaded.preprocess, Cores(threads or available_cores(), lanes)
        self._inputs = inputs
        self._threads = cores.threads
        self._lengths = _lengths(preprocess.context_length, step=TEXT_STEP if inputs.can_trim else math.inf)
        self._encode_images = _compiled(
            ov,
            _ImageTower(loaded.model, preprocess).eval(),
            torch.zeros((2, 3, *preprocess.image_size), dtype=torch.uint8),
            [-1, 3, *preprocess.image_size],
            cores,
            alone=True,
        )
        self._encode_texts = _compiled(
            ov,
            _TextTower(loaded.model).eval(),
            torch.ones((2, self._lengths[0]), dtype=torch.int64),
            [-1, -1 if inputs.can_trim else self._lengths[0]],
            cores,
            alone=False,  # what a lane has to do alone is one text, and quickly done
        )
        version = ov.__version__.partition("-")[0]
        self.info: ModelInfo = info_of(
            loaded,
            device=torch.device("cpu"),
            engine=f"openvino {version}, {inputs.how} preprocessing",
        )

    def accept(self, gate: Gate) -> None:
        """Record the gate that this engine passed."""
        self.info = replace(self.info, gate=gate)

    def tokenize(self, text: str, *, truncate: bool) -> Tokens:
        return self._inputs.tokenize(text, truncate=truncate)

    def prepare_image(self, pixels: UInt8) -> UInt8:
        return self._inputs.prepare_image(pixels)

    def encode_images(self, images: Sequence[UInt8]) -> Float32:
        batch = np.stack(images)  # (N, 3, H, W)
        with CROWD.batch(self._threads) as threads:
            return self._encode_images(batch, threads)

    def encode_texts(self, texts: Sequence[TokenIds]) -> Float32:
        longest = max(len(ids) for ids in texts)
        batch = padded(texts, self._lengths[bisect_left(self._lengths, longest)])
        with CROWD.batch(self._threads) as threads:
            return self._encode_texts(batch, threads)


def import_openvino() -> Any:
    """The package, without the reports of its use that it would send. Raises OpenVinoMissingError.

    It imports openvino_telemetry where that is there, which takes silence for consent: it writes an id into
    the home folder and sends events at every import. None in its place makes that import fail, and OpenVINO
    then goes without.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise OpenVinoMissingError(_broken(error)) from error
        raise OpenVinoMissingError(
            f"engine = 'openvino': the package is not installed; {how_to_install('openvino')}; "
            "or take --engine torch"
        ) from error
    except (ImportError, OSError) as error:  # a library of its own that is missing or does not fit
        raise OpenVinoMissingError(_broken(error)) from error


def _broken(error: Exception) -> str:
    return (
        f"engine = 'openvino': the package is installed and cannot be imported ({error}); "
        f"{how_to_reinstall('openvino')}, or take --engine torch"
    )


class _ImageTower(nn.Module):
    """(N, 3, H, W) uint8 -> (N, D) unit-norm."""

    def __init__(self, model: ClipModel, preprocess: Preprocess) -> None:
        super().__init__()
        self._model = model
        self._mean = torch.tensor(preprocess.mean).view(3, 1, 1)
        self._std = torch.tensor(preprocess.std).view(3, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels.to(torch.float32).div(255).sub(self._mean).div(self._std))


class _TextTower(nn.Module):
    """(N, L) int64 -> (N, D) unit-norm."""

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        self._model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self._model.encode_text(tokens)


def _lengths(longest: int, *, step: float) -> list[int]:
    """Multiples of `step` below the longest, and that."""
    count = math.ceil(longest / step)
    return [int(step) * n for n in range(1, count)] + [longest]


def _compiled(
    ov: Any, tower: nn.Module, example: Tensor, shape: list[int], cores: Cores, *, alone: bool
) -> _Tower:
    """alone: also for a batch that has all cores to itself. Raises UnconvertibleError."""
    model = _converted(tower, example, shape)
    try:
        return _Tower(ov.Core(), model, cores, alone=alone)
    except (RuntimeError, MemoryError) as error:
        raise UnconvertibleError.because(error) from error


def _converted(tower: nn.Module, example: Tensor, shape: list[int]) -> Any:
    """The tower as OpenVINO's graph. Raises UnconvertibleError for whatever a model of others makes of it."""
    frontends = importlib.import_module("openvino.frontend")
    reasons = (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        AssertionError,
        frontends.GeneralFailure,
        frontends.InitializationFailure,
        frontends.NotImplementedFailure,
        frontends.OpConversionFailure,
        frontends.OpValidationFailure,
    )
    with _TRACING, _traces_forgotten():
        try:
            return _through_frontend(_traced(tower, example), shape)
        except reasons as error:
            raise UnconvertibleError.because(error) from error


def _through_frontend(traced: Any, shape: list[int]) -> Any:
    """What openvino.convert_model does, without its changes to the root logger, which belongs to others."""
    frontends = importlib.import_module("openvino.frontend")
    decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
    frontend = frontends.FrontEndManager().load_by_framework("pytorch")
    decoder = decoders.TorchScriptPythonDecoder(traced)  # must live until the model has been made of it
    model = frontend.convert(frontend.load(decoder))
    model.reshape(shape)
    return model


@contextmanager
def _traces_forgotten() -> Iterator[None]:
    """torch keeps the types of all that was ever traced (pytorch#86537), 4 MB for each time that a small
    model is loaded, and each trace leaves a cycle that holds the model, weights and all, until Python's
    rarest collection comes by. Nothing here needs either afterwards.
    """
    gc.freeze()  # to collect among all the objects of a server would stop it for 0.3 s
    try:
        yield
    finally:
        torch._C._jit_clear_class_registry()
        torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
        torch.jit._state._clear_class_state()
        gc.collect()
        gc.unfreeze()


def _traced(tower: nn.Module, example: Tensor) -> Any:
    """torch warns of Python values that a trace makes constant, which the gate finds where it matters, and
    that there are newer ways, which take longer.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(tower, (example,), check_trace=False)  # type: ignore[no-untyped-call]


class _Tower:
    """One tower, compiled for batches that share the cores and, where that pays, for one that has them to
    itself: the number of threads is part of what is compiled, and each time costs the weights' memory again.
    """

    def __init__(self, core: Any, model: Any, cores: Cores, *, alone: bool) -> None:
        def compiled(threads: int, streams: int) -> _Requests:
            return _Requests(core.compile_model(model, "CPU", _options(threads, streams)))

        self._share, self._all = cores.share, cores.threads
        self._shared = compiled(cores.share * cores.lanes, cores.lanes)
        self._whole = compiled(cores.threads, 1) if alone and cores.share < cores.threads else self._shared

    def __call__(self, batch: TokenIds | UInt8, threads: int) -> Float32:
        """threads: how many the batch should use."""
        requests = self._whole if threads > (self._share + self._all) // 2 else self._shared
        with requests.one() as request:
            rows: Float32 = request.infer([batch], share_inputs=True)[0]
            return rows


def _options(threads: int, streams: int) -> dict[str, Any]:
    """streams: batches side by side, which share the threads out."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the CPU claims to be good at it
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,  # decoders and other processes use the same cores
        "ENABLE_HYPER_THREADING": True,  # a core of a cloud machine is one, and threads are counted so
    }


class _Requests:
    """Inference requests of one compiled model: each holds the memory of a forward pass, and serves one
    thread at a time.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._free: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Any]:
        with self._lock:
            request = self._free.pop() if self._free else None
        request = request or self._compiled.create_infer_request()
        yield request
        with self._lock:  # not where it raised: nobody says what state that leaves it in
            self._free.append(request)
