"""Micro-batches are refused for models whose features of a sample depend on the samples beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede timm and open_clip)
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import Attention as OpenClipAttention
from timm.layers.attention import Attention
from timm.layers.drop import DropBlock2d, DropPath
from torch import nn

from clipstack.config.models import ModelConfig
from clipstack.errors import ConfigError
from clipstack.model import build_model
from clipstack.training.dropout import key_dropouts
from clipstack.training.separable import check_separable, uses_batch_statistics


class OwnDropout(nn.Dropout):
    """What it means is unknown."""


def hugging_face(**config: Any) -> HFTextEncoder:
    """A text tower without its weights."""
    tower = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(tower)
    tower.config = SimpleNamespace(**config)
    return tower


MIXING = [
    nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    nn.Dropout2d(0.1), OwnDropout(0.1), DropBlock2d(0.1), nn.MultiheadAttention(4, 2, dropout=0.1),
    nn.GRU(4, 4, num_layers=2, dropout=0.1), OpenClipAttention(4, 2, attn_drop=0.1),
    hugging_face(attention_probs_dropout_prob=0.1), hugging_face(dropout_rate=0.1),
]  # fmt: skip
SEPARABLE = [
    nn.BatchNorm2d(4).eval(), nn.Dropout2d(0.0), nn.Dropout(0.1), DropPath(0.1), nn.LayerNorm(4),
    nn.MultiheadAttention(4, 2), Attention(4, 2, attn_drop=0.1), OpenClipAttention(4, 2),
    hugging_face(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.1),
]  # fmt: skip


@pytest.mark.parametrize("module", MIXING, ids=lambda module: type(module).__name__)
def test_a_module_that_mixes_samples_is_refused_by_name(module: nn.Module) -> None:
    model = nn.Sequential(nn.ModuleDict({"trunk": module}))
    key_dropouts(model)
    kind = type(module).__name__
    with pytest.raises(ConfigError, match=rf"train\.micro_batch_size = 4: 0\.trunk \({kind}\)"):
        check_separable(model, 4)


@pytest.mark.parametrize("module", SEPARABLE, ids=lambda module: type(module).__name__)
def test_what_looks_at_one_sample_only_is_fine(module: nn.Module) -> None:
    model = nn.Sequential(module)
    key_dropouts(model)
    check_separable(model, 4)


def resnet(**changes: Any) -> ModelConfig:
    return ModelConfig(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        **changes,
    )


def test_a_locked_tower_keeps_its_statistics_and_may_be_cut() -> None:
    free, locked = build_model(resnet(), seed=0), build_model(resnet(lock_image=True), seed=0)
    with pytest.raises(ConfigError, match=r"visual\.bn1 \(BatchNorm2d\) normalises by the statistics"):
        check_separable(free, 4)
    for model in (free, locked):
        model.eval().train()
        before = model.towers.visual.bn1.running_mean.clone()
        model.encode_image(torch.randn(4, 3, 32, 32))
        assert torch.equal(before, model.towers.visual.bn1.running_mean) == (model is locked)
    assert not any(map(uses_batch_statistics, locked.modules()))
    check_separable(locked, 4)
