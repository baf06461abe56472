"""Both towers as ONNX files with a dynamic batch, checked against the model in onnxruntime before they get
their names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipstack.errors import CheckpointError, ConfigError, how_to_install
from clipstack.files import whole_folder
from clipstack.model import ClipModel

FORMAT = 1
FOLDER = "onnx"
IMAGE_FILE, TEXT_FILE, RECORD_FILE = "image.onnx", "text.onnx", "onnx.json"
MIN_COSINE = 0.99999
CHECKED_BATCHES = (1, 2, 5)
MAX_BYTES_IN_ONE_FILE = 1_500_000_000
"""A protobuf message ends at 2 GiB; weights of larger towers lie beside the .onnx file."""


class _Image(nn.Module):
    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _Text(nn.Module):
    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def export_onnx(model: ClipModel, out: Path) -> Path:
    """Write OUT/onnx/image.onnx, text.onnx and onnx.json; returns that folder. The model is in eval mode,
    fp32, on the CPU.

    image.onnx: pixel_values (batch, 3, H, W) float32, normalised -> image_embeds (batch, D) unit-norm.
    text.onnx: input_ids (batch, context_length) int64 -> text_embeds (batch, D) unit-norm.
    Raises ConfigError without the onnx extra, CheckpointError where onnxruntime's features differ.
    """
    _require_onnx()
    images, tokens = _inputs(model, batch=max(CHECKED_BATCHES))
    with whole_folder(out / FOLDER) as folder:
        _export(_Image(model).eval(), images, folder / IMAGE_FILE, names=("pixel_values", "image_embeds"))
        _export(_Text(model).eval(), tokens, folder / TEXT_FILE, names=("input_ids", "text_embeds"))
        worst = min(
            _least_cosine(folder / IMAGE_FILE, images, model.encode_image),
            _least_cosine(folder / TEXT_FILE, tokens, model.encode_text),
        )
        if worst < MIN_COSINE:
            raise CheckpointError(
                f"{out / FOLDER}: features in onnxruntime have cosine {worst:.6f} with the model's, below "
                f"{MIN_COSINE}; nothing was written: try other versions of torch and onnxruntime"
            )
        record = json.dumps(_record(model, worst), indent=2)
        (folder / RECORD_FILE).write_text(record + "\n", encoding="utf-8")
    return out / FOLDER


def _inputs(model: ClipModel, *, batch: int) -> tuple[Tensor, Tensor]:
    """Random images, and random tokens that end at different places."""
    random = torch.Generator().manual_seed(0)
    size = model.record.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    length = model.record.context_length
    vocabulary = model.record.model_cfg["text_cfg"].get("vocab_size", 49408)
    tokens = torch.randint(1, vocabulary - 1, (batch, length), generator=random)
    for row in range(batch):
        tokens[row, (row * length) // batch :] = 0
        tokens[row, (row * length) // batch] = vocabulary - 1  # the largest id ends a text
    return torch.randn(batch, 3, height, width, generator=random), tokens


def _export(tower: nn.Module, example: Tensor, path: Path, *, names: tuple[str, str]) -> None:
    size_bytes = sum(p.numel() * p.element_size() for p in tower.parameters())
    with warnings.catch_warnings():
        # About torch's own internals; nothing that a user could act on.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower,
            (example,),
            str(path),
            dynamo=True,
            verbose=False,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=size_bytes > MAX_BYTES_IN_ONE_FILE,
        )


def _least_cosine(path: Path, inputs: Tensor, reference: Any) -> float:
    """The lowest cosine between onnxruntime's features and the model's, over several batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    lowest = 1.0
    for batch in CHECKED_BATCHES:
        with torch.no_grad():
            expected = reference(inputs[:batch]).double().numpy()
        (given,) = session.run(None, {name: inputs[:batch].numpy()})
        norms = np.linalg.norm(given, axis=1) * np.linalg.norm(expected, axis=1)
        lowest = min(lowest, float(((given.astype(np.float64) * expected).sum(axis=1) / norms).min()))
    return lowest


def _record(model: ClipModel, worst: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "image": {"file": IMAGE_FILE, "input": "pixel_values", "output": "image_embeds"},
        "text": {"file": TEXT_FILE, "input": "input_ids", "output": "text_embeds"},
        "context_length": model.record.context_length,
        "preprocess": model.record.preprocess_cfg,
        "logit_scale": float(model.bounded_logit_scale().detach().exp()),
        "logit_bias": None if model.towers.logit_bias is None else float(model.towers.logit_bias.detach()),
        "least_cosine_in_onnxruntime": worst,
    }


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"--onnx needs {error.name}: {how_to_install('onnx')}") from error
