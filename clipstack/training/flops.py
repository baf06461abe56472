"""Model FLOPs utilisation: what a model's training computes, and what a device could."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipstack.model import ClipModel
from clipstack.training.precision import Precision
from clipstack.world import World

DENSE_BF16_FLOPS = {
    "V100": 125e12, "T4": 65e12, "A10": 125e12, "A100": 312e12, "L4": 121e12, "L40": 181e12,
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
}  # fmt: skip
"""Peaks of dense bf16 (fp16 for V100 and T4) matrix products a second, from the makers' data sheets."""


def flops_per_pair(model: ClipModel) -> float:
    """Floating-point operations of a forward and backward pass for one image and one text; the backward
    counts twice the forward. Recomputation by gradient checkpointing is not counted, as is usual for MFU."""
    record = model.record
    size = record.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    on_meta = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(
            torch.empty(1, 3, height, width, device="meta"),
            torch.ones(1, record.context_length, dtype=torch.int64, device="meta"),
        )
    return 3.0 * float(counter.get_total_flops())


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The device's peak for this precision, in operations a second; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    fitting = [name for name in DENSE_BF16_FLOPS if all(part in words for part in name.split())]
    return DENSE_BF16_FLOPS[max(fitting, key=len)] if fitting else None


def peak_seconds_per_sample(model: ClipModel, world: World, precision: Precision) -> float | None:
    """Seconds that all devices at their peak would take to train on one pair; None where no peak is known."""
    peak = peak_flops(world.device, precision)
    return None if peak is None else flops_per_pair(model) / (peak * world.size)
