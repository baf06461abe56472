"""AdamW and its parameter groups: which weights decay, and layer-wise learning rates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipstack.config.models import OptimConfig
from clipstack.errors import ConfigError
from clipstack.towers import block_stacks


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, in groups by weight decay and learning-rate scale."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    depth = _Depth(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (decays(name, parameter), config.layer_decay ** depth.below_output(name))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError("model.lock_image, model.lock_text: nothing is left to train; unlock a tower")
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": config.weight_decay if decay else 0.0, "lr_scale": lr_scale}
            for (decay, lr_scale), params in groups.items()
        ],
        lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
    )  # fmt: skip


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices and filters: not for gains, biases, logit_scale, or embeddings of
    position."""
    is_position = "positional_embedding" in name or "pos_embed" in name or "class_embedding" in name
    return parameter.ndim >= 2 and not is_position


class _Depth:
    """How many blocks lie between a parameter and its tower's output, for layer-wise learning-rate decay.

    The input layers (embeddings, patch convolution) lie below all blocks; norms and projections after them
    are depth 0.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = {name: len(stack) for name, stack in block_stacks(model).items()}

    def below_output(self, name: str) -> int:
        for blocks, count in self._blocks.items():
            if name.startswith(f"{blocks}."):
                return count - 1 - int(name[len(blocks) + 1 :].split(".")[0])
        is_input = any(
            part in name
            for part in ("conv1", "class_embedding", "pos", "token_embedding", "patch_embed", "ln_pre")
        )
        if not is_input or not self._blocks:
            return 0
        tower_blocks = [
            n for b, n in self._blocks.items() if (".visual." in f".{b}") == (".visual." in f".{name}")
        ]
        return max(tower_blocks, default=0)
