"""The tiled objectives against the slow definitions: values, gradients, any shape, any tile, any dtype,
little memory.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from clipstack.losses import Embeddings, build_objective
from clipstack.world import World
from tests.clipstack.losses import reference

CONFIGS: list[dict[str, Any]] = [
    {"name": "clip"},
    {"name": "clip", "label_smoothing": 0.2},
    {"name": "hard_negative", "beta": 0.5},
    {"name": "hard_negative", "beta": 1.0, "tau_plus": 0.05, "alpha": 0.7},
    {"name": "hard_negative", "beta": 2.0, "beta_mode": "cosine", "alpha": 0.0},
    {"name": "hard_negative", "beta": 0.5, "detach_weights": True, "label_smoothing": 0.1},
    {"name": "hard_negative", "beta": 1.5, "beta_mode": "cosine", "detach_weights": True},
    {"name": "debiased", "tau_plus": 0.1},
    {"name": "dcl"},
    {"name": "siglip"},
]


def unit(n: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)
        .to(dtype)
        .requires_grad_()
    )


def well_rounded(n: int, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Features in a short dtype whose norms are 1 in fp64 too, so that both may be handed in."""
    many = unit(8 * n, dim, seed, dtype).detach()
    gaps = (many.double().norm(dim=1) - 1).abs()
    return many[gaps < 9e-4][:n].requires_grad_()


def ours(config: dict[str, Any], leaves: list[Tensor], ids: Tensor | None, tile: tuple[int, int]) -> Tensor:
    return build_objective(config, World(), tile=tile)(Embeddings(*leaves), sample_ids=ids).total


def slow(config: dict[str, Any], leaves: list[Tensor], ids: Tensor | None) -> Tensor:
    if config["name"] == "siglip":
        return reference.sigmoid_loss(*leaves, ids=ids)
    return reference.softmax_loss(*leaves[:3], config, ids=ids)


def with_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        loss.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)),
    ]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("logit_scale", "ids"), [(2.0, None), (4.6, None), (1.0, [0, 1, 2, 0, 3, 4, 0])])
def test_value_and_gradients_are_those_of_the_definition(
    config: dict[str, Any], logit_scale: float, ids: list[int] | None
) -> None:
    leaves = [unit(7, 3, 1), unit(7, 3, 2), scalar(logit_scale), scalar(-2.0)]
    sample_ids = None if ids is None else torch.tensor([ids, range(10, 17)]).T
    want = with_gradients(slow(config, leaves, sample_ids), leaves)
    for tile in ((1, 1), (3, 2), (64, 64)):
        got = with_gradients(ours(config, leaves, sample_ids, tile), leaves)
        for got_one, want_one in zip(got, want, strict=True):
            torch.testing.assert_close(got_one, want_one, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape_tile_ids_and_dtype(data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 6))
    tile = data.draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    config = data.draw(st.sampled_from(CONFIGS))
    id_lists = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    drawn = data.draw(st.none() | st.lists(id_lists, min_size=1, max_size=3))
    ids = None if drawn is None else torch.tensor(drawn).T
    log_scale = data.draw(st.floats(-1.0, 4.6))
    leaves = [unit(n, dim, 1, dtype), unit(n, dim, 2, dtype), scalar(log_scale), scalar(-1.0)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, want = (
        with_gradients(ours(config, leaves, ids, tile), leaves),
        with_gradients(slow(config, exact, ids), exact),
    )
    # Short features: what is exact is the arithmetic on them, in fp32; gradients come back in their dtype.
    eps = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    arithmetic = eps if dtype == torch.float64 else 2e-4
    scale_of = max(1.0, float(torch.tensor(log_scale).exp()))
    assert abs(float(got[0] - want[0])) <= arithmetic * scale_of
    for got_one, want_one in zip(got[1:], want[1:], strict=True):
        assert float((got_one - want_one).abs().max()) <= eps * scale_of


# A stopped gradient is not the derivative of the value.
@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.get("detach_weights")], ids=str)
def test_gradcheck(config: dict[str, Any]) -> None:
    raw = [torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        leaves = [normalize(image, dim=1), normalize(text, dim=1), scale, bias]
        return ours(config, leaves, torch.tensor([0, 1, 2, 1]), (3, 2))

    leaves = [*(x.requires_grad_() for x in raw), scalar(1.0), scalar(-1.0)]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_accumulated_in_fp32(dtype: torch.dtype) -> None:
    leaves = [*(well_rounded(600, 64, seed, dtype) for seed in (1, 2)), torch.tensor(4.6, requires_grad=True)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for config in ({"name": "clip"}, {"name": "hard_negative", "beta": 0.5}):
        got = with_gradients(ours(config, leaves, None, (128, 256)), leaves)
        want = with_gradients(ours(config, exact, None, (128, 256)), exact)
        assert abs(float(got[0] - want[0])) <= 3.3e-4
        for k in (1, 2):
            cosine = torch.nn.functional.cosine_similarity(
                got[k].double().flatten(), want[k].flatten(), dim=0
            )
            assert float(cosine) >= 0.99998


def test_autocast_does_not_reach_into_the_loss() -> None:
    leaves = [
        unit(50, 16, 1, torch.float32),
        unit(50, 16, 2, torch.float32),
        torch.tensor(4.0, requires_grad=True),
    ]
    want = with_gradients(ours({"name": "clip"}, leaves, None, (16, 16)), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(ours({"name": "clip"}, leaves, None, (16, 16)), leaves)
    for got_one, want_one in zip(got, want, strict=True):
        torch.testing.assert_close(got_one, want_one, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hard_negative", "dcl", "clip", "siglip"])
def test_anchors_without_negatives_cost_nothing_and_stay_finite(name: str) -> None:
    leaves = [unit(5, 3, 1), unit(5, 3, 2), scalar(4.6), scalar(-1.0)]
    loss = ours({"name": name}, leaves, torch.zeros(5, dtype=torch.int64), (2, 2))
    loss, *grads = with_gradients(loss, leaves)
    if name != "siglip":
        assert float(loss) == 0.0 and all(float(grad.abs().max()) == 0.0 for grad in grads)
    assert all(bool(grad.isfinite().all()) for grad in grads)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made in its scope that are alive, and remembers the peak and the
    largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

        def gone() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize(
    "config", [{"name": "clip"}, {"name": "hard_negative", "beta": 0.5}, {"name": "siglip"}]
)
def test_peak_allocation_is_a_few_tiles_and_never_a_matrix_of_pairs(config: dict[str, Any]) -> None:
    n, dim, tile = 2048, 16, (128, 256)
    leaves = [unit(n, dim, 1, torch.float32), unit(n, dim, 2, torch.float32)]
    leaves += [torch.tensor(2.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)]
    gc.collect()
    with LiveBytes() as memory:
        ours(config, leaves, torch.arange(n) % (n - 9), tile).backward()
    tile_bytes, feature_bytes = 4 * tile[0] * tile[1], 4 * n * dim
    assert memory.largest <= max(8 * tile[0] * tile[1], 8 * n * 4, feature_bytes, 4 * 512 * 511 // 2 * 2)
    assert memory.peak <= 12 * tile_bytes + 8 * feature_bytes + 64 * n * 8
    assert memory.peak < 4 * n * n / 4  # the matrix of pairs alone would take four times as much
