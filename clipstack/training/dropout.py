"""Dropout whose draws belong to a sample's place in the global batch, so that they do not depend on how it is
cut.

A generator's draws depend on what was drawn before: one large batch, four micro-batches and two ranks would
drop different things. Here a draw is a hash of (seed, step, place in the global batch, module, element).
Accumulation is then exact with dropout on, a run can be resumed on another number of ranks, and there is no
generator state to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import torch
from open_clip.transformer import PatchDropout
from timm.layers import patch_dropout as timm_patches
from timm.layers.drop import DropPath
from torch import Tensor, nn

from clipstack.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MUL_1, _MUL_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def hashed(x: Tensor) -> Tensor:
    """int64 -> int64, every bit depending on every bit: splitmix64's finaliser (https://prng.di.unimi.it)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MUL_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MUL_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def row_keys(seed: int, step: int, rows: Tensor) -> Tensor:
    """(B,) int64 keys of the samples at these places of a step's global batch."""
    return hashed(hashed(rows + hashed(torch.full_like(rows, seed))) + step * _GOLDEN % 2**63)


@dataclass
class DropoutKeys:
    """Shared by a model's dropouts; the engine sets it before each pass. rows: (samples,) from
    `row_keys`."""

    rows: Tensor | None = None

    def bits(self, x: Tensor, salt: int, elements: int) -> Tensor:
        """(B, elements) int64, uniform over all values, for a module's input x (B, ...). Raises
        ConfigError."""
        assert self.rows is not None, "the engine sets one key for each sample"
        # A sample may be several rows, such as the windows of its image, one after the other.
        rows_each, rest = divmod(len(x), len(self.rows))
        if rest:
            raise ConfigError(
                f"model: a dropout sees {len(x)} rows for {len(self.rows)} samples, so its draws cannot be "
                "keyed by sample; set this tower's dropout to 0"
            )
        keys = hashed(self.rows + salt)
        places = torch.arange(1, rows_each * elements + 1, device=x.device)
        return hashed(keys[:, None] + _GOLDEN * places).reshape(len(x), elements)

    def uniform(self, x: Tensor, salt: int, elements: int) -> Tensor:
        """(B, elements) fp32 in [0, 1)."""
        return ((self.bits(x, salt, elements) >> 40) & 0xFFFFFF).float() / 2**24


class KeyedDropout(nn.Module):
    """nn.Dropout over inputs (B, ...)."""

    def __init__(self, p: float, keys: DropoutKeys, salt: int) -> None:
        super().__init__()
        self.p, self._keys, self._salt = p, keys, salt

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = self._keys.uniform(x, self._salt, x[0].numel()).reshape(x.shape) >= self.p
        return x * keep / (1 - self.p)


class KeyedDropPath(nn.Module):
    """timm's DropPath: a residual branch is dropped for whole samples."""

    def __init__(self, p: float, scale_by_keep: bool, keys: DropoutKeys, salt: int) -> None:
        super().__init__()
        self.p, self._keys, self._salt = p, keys, salt
        self._scale = 1 / (1 - p) if scale_by_keep and p < 1 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = self._keys.uniform(x, self._salt, 1) >= self.p
        return x * keep.reshape(-1, *[1] * (x.ndim - 1)) * self._scale


class KeyedPatchDropout(nn.Module):
    """open_clip's and timm's PatchDropout (https://arxiv.org/abs/2212.00794): keeps a random share of each
    image's patches, and the `first` tokens before them."""

    def __init__(self, prob: float, first: int, keys: DropoutKeys, salt: int) -> None:
        super().__init__()
        self.prob, self._first = prob, first
        self._keys, self._salt = keys, salt

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, kept, width)"""
        if not self.training or self.prob == 0:
            return x
        patches = x[:, self._first :]
        kept = max(1, int(patches.shape[1] * (1 - self.prob)))
        places = self._keys.bits(x, self._salt, patches.shape[1]).topk(kept, dim=-1).indices  # (B, kept)
        chosen = patches.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return torch.cat((x[:, : self._first], chosen), dim=1)


def key_dropouts(model: nn.Module) -> DropoutKeys:
    """Put keyed modules in the place of a model's dropouts; returns their keys. Raises ConfigError."""
    keys = DropoutKeys()
    salt = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            salt += 1
            keyed = _keyed(child, keys, salt * 0x5851F42D4C957F2D % 2**63)
            if keyed is not None:
                setattr(parent, name, keyed.train(child.training))
    for module in model.modules():
        _unfuse(module)
    return keys


def _unfuse(module: nn.Module) -> None:
    """Have timm's attention drop by its module: fused attention reads the probability and drops by itself."""
    drop = getattr(module, "attn_drop", None)
    if isinstance(drop, KeyedDropout) and drop.p > 0 and hasattr(module, "fused_attn"):
        module.fused_attn = False  # type: ignore[assignment]  # a plain flag of timm's


def _keyed(module: nn.Module, keys: DropoutKeys, salt: int) -> nn.Module | None:
    # By exact type: a subclass may mean something else.
    if type(module) is nn.Dropout:
        return KeyedDropout(module.p, keys, salt)
    if type(module) is DropPath:
        return KeyedDropPath(module.drop_prob, module.scale_by_keep, keys, salt)
    if type(module) is PatchDropout:
        prob, first = cast(float, module.prob), int(cast(bool, module.exclude_first_token))
        return KeyedPatchDropout(prob, first, keys, salt)
    if type(module) is timm_patches.PatchDropout:
        return KeyedPatchDropout(module.prob, module.num_prefix_tokens, keys, salt)
    if isinstance(module, timm_patches.PatchDropoutWithIndices) and module.prob > 0:
        raise ConfigError(
            f"model.vision_cfg.patch_dropout = {module.prob}: in this tower its draws would depend on how a "
            "batch is cut; set it to 0, or choose another tower"
        )
    return None
