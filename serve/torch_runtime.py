"""The torch engine: a model loaded by `clipstack`, on CPU or CUDA, in float32 or bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from clipstack.checkpoint import LoadedModel
from clipstack.model import ClipModel

import numpy as np  # isort: skip
import torch  # isort: skip
from torch import Tensor  # isort: skip

from serve.inputs import Inputs, info_of, padded, use_torch_threads
from serve.runtime import CROWD, Float32, Gate, TokenIds, Tokens, UInt8, available_cores


class TorchRuntime:
    """One model on one device. See `serve.runtime.Runtime` for the methods."""

    def __init__(
        self,
        loaded: LoadedModel,
        inputs: Inputs,
        *,
        device: torch.device,
        threads: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._loaded = loaded
        self._inputs = inputs
        self._device = device
        self._threads = threads or available_cores()
        self._dtype = dtype
        self._model: ClipModel = loaded.model.to(dtype)
        self.info = info_of(
            loaded, device=device, engine=f"torch {torch.__version__}, {inputs.how} preprocessing"
        )

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
            apart, self._inputs, device=self._device, threads=self._threads, dtype=torch.bfloat16
        )
        fingerprint = f"{self.info.fingerprint}-bfloat16"
        twin.info = replace(self.info, fingerprint=fingerprint, dtype="bfloat16", gate=None)
        return twin

    def tokenize(self, text: str, *, truncate: bool) -> Tokens:
        return self._inputs.tokenize(text, truncate=truncate)

    def prepare_image(self, pixels: UInt8) -> UInt8:
        return self._inputs.prepare_image(pixels)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[UInt8]) -> Float32:
        with CROWD.batch(self._threads) as threads:
            use_torch_threads(threads)
            batch = torch.from_numpy(np.stack(images)).to(self._device, non_blocking=True)  # (N, 3, H, W)
            normal = self._loaded.preprocess.normalize(batch).to(self._dtype)
            return rows_of(self._model.encode_image(normal))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[TokenIds]) -> Float32:
        batch = torch.from_numpy(padded(texts, max(len(ids) for ids in texts)))  # (N, longest)
        with CROWD.batch(self._threads) as threads:
            use_torch_threads(threads)
            return rows_of(self._model.encode_text(batch.to(self._device, non_blocking=True)))


def rows_of(vectors: Tensor) -> Float32:
    """(N, D) of any type and device -> float32 in the process's memory."""
    rows: Float32 = vectors.float().cpu().numpy()
    return rows
