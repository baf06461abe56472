"""GradCache in one process: what is encoded when, and the whole batch's gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipstack.losses import build_objective
from clipstack.losses.types import Embeddings
from clipstack.training.grad_cache import GradCache, OnePass, Part, make_passes
from clipstack.world import World


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 5), nn.Linear(4, 5)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))
        self.calls: list[tuple[int, bool]] = []

    def encode(self, part: Part) -> Embeddings:
        self.calls.append((len(part.images), torch.is_grad_enabled()))
        return Embeddings(
            nn.functional.normalize(self.image(part.images), dim=-1),
            nn.functional.normalize(self.text(part.tokens), dim=-1),
            self.logit_scale * 1.0,
            self.logit_bias * 1.0,
        )


def gradients(
    objective: str, micro_batch_size: int | None
) -> tuple[dict[str, Tensor], list[tuple[int, bool]]]:
    towers = Towers()
    torch.manual_seed(1)
    share = Part(torch.randn(12, 6), torch.randn(12, 4), torch.arange(12))
    passes = make_passes(
        towers.encode, lambda loss: loss.backward(), share=12, micro_batch_size=micro_batch_size
    )
    loss = build_objective({"name": objective}, World())(passes.forward(share))
    passes.backward(loss.total)
    return {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}, towers.calls


def test_a_micro_batch_at_a_time_gives_the_gradients_of_the_whole() -> None:
    for objective in ("clip", "siglip"):
        whole, _ = gradients(objective, None)
        assert ("logit_bias" in whole) == (objective == "siglip")
        for size in (1, 2, 3, 4, 6):
            parts, _ = gradients(objective, size)
            assert parts.keys() == whole.keys() | {"logit_bias"}
            for name, gradient in whole.items():
                torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-7)


def test_no_pass_with_a_graph_is_larger_than_a_micro_batch() -> None:
    """What activations take therefore does not grow with the batch."""
    _, calls = gradients("clip", 3)
    assert calls == [(3, False)] * 4 + [(3, True)] * 4


def test_a_micro_batch_of_the_whole_share_is_one_pass() -> None:
    assert isinstance(make_passes(Towers().encode, print, share=8, micro_batch_size=8), OnePass)
    assert isinstance(make_passes(Towers().encode, print, share=8, micro_batch_size=4), GradCache)
