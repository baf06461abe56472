"""Keyed dropout: the right shares, independent draws, and the same draws however the batch is cut."""

from __future__ import annotations

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede timm and open_clip)
import pytest
import torch
from open_clip.transformer import PatchDropout
from timm.layers import patch_dropout as timm_patches
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from torch import Tensor, nn

from clipstack.errors import ConfigError
from clipstack.training.dropout import DropoutKeys, KeyedPatchDropout, key_dropouts, row_keys


def keyed(*modules: nn.Module) -> tuple[nn.Sequential, DropoutKeys]:
    model = nn.Sequential(*modules)
    return model, key_dropouts(model)


def drawn(model: nn.Module, keys: DropoutKeys, x: Tensor, rows: Tensor, *, step: int = 0) -> Tensor:
    keys.rows = row_keys(0, step, rows)
    out: Tensor = model(x)
    return out


def test_shares_and_means_are_those_of_the_modules_replaced() -> None:
    x = torch.ones(4000, 50, 4)
    model, keys = keyed(nn.Dropout(0.3))
    out = drawn(model, keys, x, torch.arange(4000))
    assert abs(float((out == 0).float().mean()) - 0.3) < 3e-3 and abs(float(out.mean()) - 1) < 5e-3
    model, keys = keyed(DropPath(0.25))
    out = drawn(model, keys, x, torch.arange(4000))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1)), "whole samples"
    assert abs(float((per_sample[:, 0] == 0).float().mean()) - 0.25) < 0.03
    assert abs(float(out.max()) - 1 / 0.75) < 1e-6


@pytest.mark.parametrize("module", [PatchDropout(0.5), timm_patches.PatchDropout(0.5, num_prefix_tokens=1)])
def test_patch_dropout_keeps_the_class_token_and_each_patch_equally_often(module: nn.Module) -> None:
    places = torch.arange(17.0).expand(8000, 17)[..., None]  # (B, tokens, 1): each token is its place
    model, keys = keyed(module)
    assert isinstance(model[0], KeyedPatchDropout)
    out = drawn(model, keys, places, torch.arange(8000))[..., 0].long()  # (B, kept)
    assert out.shape == (8000, 9) and bool((out[:, 0] == 0).all())
    assert all(len(set(row.tolist())) == 9 for row in out[:50]), "no patch twice"
    share = torch.bincount(out[:, 1:].flatten(), minlength=17)[1:] / 8000
    assert float((share - 0.5).abs().max()) < 0.03


def test_a_patch_dropout_that_cannot_be_keyed_is_refused_where_it_drops() -> None:
    keyed(timm_patches.PatchDropoutWithIndices(0.0))
    with pytest.raises(ConfigError, match=r"model\.vision_cfg\.patch_dropout = 0\.5"):
        keyed(timm_patches.PatchDropoutWithIndices(0.5))


def test_a_batch_cut_in_parts_draws_as_the_whole() -> None:
    x = torch.randn(12, 10, 6)
    model, keys = keyed(nn.Dropout(0.5), DropPath(0.5), PatchDropout(0.4))
    rows = torch.arange(12)
    whole = drawn(model, keys, x, rows)
    parts = torch.cat([drawn(model, keys, x[i : i + 3], rows[i : i + 3]) for i in range(0, 12, 3)])
    assert torch.equal(whole, parts)


def test_attention_drops_by_key_too_where_it_would_be_fused() -> None:
    x = torch.randn(12, 10, 6)
    attention = Attention(6, num_heads=2, attn_drop=0.5)
    assert attention.fused_attn, "else this tests nothing"
    model, keys = keyed(attention)
    rows = torch.arange(12)
    whole = drawn(model, keys, x, rows)
    parts = torch.cat([drawn(model, keys, x[i : i + 3], rows[i : i + 3]) for i in range(0, 12, 3)])
    torch.testing.assert_close(parts, whole)
    assert not torch.allclose(whole, drawn(model, keys, x, rows, step=1)), "it drops"
    untouched, _ = keyed(Attention(6, num_heads=2))
    assert untouched[0].fused_attn, "without dropout it stays fast"


def test_a_sample_that_is_several_rows_draws_for_each() -> None:
    """As in towers that attend within windows: (samples x windows, ...), a sample's windows together."""
    x = torch.ones(12 * 4, 50)
    model, keys = keyed(nn.Dropout(0.5))
    whole = drawn(model, keys, x, torch.arange(12))
    parts = [drawn(model, keys, x[i * 4 : i * 4 + 12], torch.arange(i, i + 3)) for i in range(0, 12, 3)]
    assert torch.equal(whole, torch.cat(parts))
    assert len({tuple(row.tolist()) for row in whole}) == len(whole)
    with pytest.raises(ConfigError, match="48 rows for 11 samples"):
        drawn(model, keys, x, torch.arange(11))


def test_steps_samples_and_modules_draw_independently() -> None:
    x = torch.ones(64, 400)
    model, keys = keyed(nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.5))
    first = drawn(model[:1], keys, x, torch.arange(64)) > 0
    others = [
        drawn(model[2:], keys, x, torch.arange(64)) > 0,
        drawn(model[:1], keys, x, torch.arange(64), step=1) > 0,
        drawn(model[:1], keys, x, torch.arange(64) + 64) > 0,
        first.roll(1, 0),
        first.roll(1, 1),
    ]
    for other in others:
        agreement = float((first == other).float().mean())
        assert abs(agreement - 0.5) < 0.015


def test_in_evaluation_nothing_is_dropped() -> None:
    x = torch.randn(3, 5, 2)
    model, _ = keyed(nn.Dropout(0.5), DropPath(0.5), PatchDropout(0.5))
    assert torch.equal(model.eval()(x), x)
