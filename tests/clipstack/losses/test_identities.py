"""Corners of the family that others have published: open_clip's losses, torch's cross entropy, the authors'
criterion.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipstack.losses import Embeddings, build_objective
from clipstack.world import World

N, D = 9, 6


def open_clip_losses() -> Any:
    """open_clip.loss from its own file: the package would load every tower."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).parent / "loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1).requires_grad_()


def leaves() -> list[Tensor]:
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -4.0)]
    return [unit(N, 1), unit(N, 2), *scalars]


def ours(config: dict[str, Any], inputs: list[Tensor], **more: Any) -> Tensor:
    return build_objective(config, World(), tile=(4, 4))(Embeddings(*inputs), **more).total


def assert_same(got: Tensor, want: Tensor, inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    """Value and all gradients."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    used = [
        x
        for x, grad in zip(
            inputs, torch.autograd.grad(want, inputs, retain_graph=True, allow_unused=True), strict=True
        )
        if grad is not None
    ]
    for one, other in zip(torch.autograd.grad(got, used), torch.autograd.grad(want, used), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "config", [{"name": "clip"}, {"name": "hard_negative", "beta": 0.0, "tau_plus": 0.0, "alpha": 1.0}]
)
def test_the_plain_corner_is_open_clips_clip_loss(config: dict[str, Any]) -> None:
    inputs = leaves()
    want = open_clip_losses().ClipLoss()(inputs[0], inputs[1], inputs[2].exp())
    assert_same(ours(config, inputs[:3]), want, inputs[:3])


def test_siglip_is_open_clips_siglip_loss() -> None:
    inputs = leaves()
    want = open_clip_losses().SigLipLoss()(inputs[0], inputs[1], inputs[2].exp(), inputs[3])
    assert_same(ours({"name": "siglip"}, inputs), want, inputs)


def test_label_smoothing_is_that_of_torchs_cross_entropy() -> None:
    inputs = leaves()[:3]
    logits = inputs[2].exp() * inputs[0] @ inputs[1].T
    target = torch.arange(N)
    want = 0.5 * sum(cross_entropy(z, target, label_smoothing=0.3) for z in (logits, logits.T))
    assert_same(ours({"name": "clip", "label_smoothing": 0.3}, inputs), want, inputs)


def authors_criterion(
    out_1: Tensor, out_2: Tensor, *, tau_plus: float, beta: float, temperature: float
) -> Tensor:
    """Robinson et al.'s own code for one tower and two views: github.com/joshr17/HCL, image/main.py,
    estimator "hard".
    """
    batch_size = len(out_1)
    out = torch.cat([out_1, out_2], dim=0)
    neg = torch.exp(torch.mm(out, out.t().contiguous()) / temperature)
    mask = ~torch.eye(batch_size, dtype=torch.bool).repeat(2, 2)
    neg = neg.masked_select(mask).view(2 * batch_size, -1)
    pos = torch.exp(torch.sum(out_1 * out_2, dim=-1) / temperature)
    pos = torch.cat([pos, pos], dim=0)
    number = batch_size * 2 - 2
    imp = (beta * neg.log()).exp()
    reweight_neg = (imp * neg).sum(dim=-1) / imp.mean(dim=-1)
    ng = (-tau_plus * number * pos + reweight_neg) / (1 - tau_plus)
    ng = torch.clamp(ng, min=number * np.e ** (-1 / temperature))
    return (-torch.log(pos / (pos + ng))).mean()


@pytest.mark.parametrize(("beta", "tau_plus"), [(1.0, 0.1), (0.5, 0.0), (0.0, 0.05)])
def test_hard_negatives_are_the_authors_criterion_in_its_one_tower_form(beta: float, tau_plus: float) -> None:
    one, two, log_scale = unit(N, 1), unit(N, 2), torch.tensor(2.0, dtype=torch.float64)
    want = authors_criterion(one, two, tau_plus=tau_plus, beta=beta, temperature=float((-log_scale).exp()))
    config = {"name": "hard_negative", "beta": beta, "tau_plus": tau_plus}
    views, others, instance = torch.cat([one, two]), torch.cat([two, one]), torch.arange(N).repeat(2)
    assert_same(ours(config, [views, others, log_scale], sample_ids=instance), want, [one, two])


def test_queue_adds_detached_negatives_to_both_sides() -> None:
    objective = build_objective({"name": "clip", "queue_size": 4}, World(), tile=(2, 3))
    old_image, old_text, scale = unit(6, 3), unit(6, 4), torch.tensor(2.0, dtype=torch.float64)
    objective(Embeddings(old_image, old_text, scale))
    image, text = unit(N, 1), unit(N, 2)
    got = objective(Embeddings(image, text, scale)).total
    target, s = torch.arange(N), scale.exp()
    rows = s * torch.cat([image @ text.T, image @ old_text[-4:].detach().T], 1)
    cols = s * torch.cat([text @ image.T, text @ old_image[-4:].detach().T], 1)
    assert_same(got, 0.5 * (cross_entropy(rows, target) + cross_entropy(cols, target)), [image, text])


def test_queued_duplicates_are_no_negatives() -> None:
    config, scale = {"name": "clip", "queue_size": 4}, torch.tensor(2.0, dtype=torch.float64)
    inputs = [unit(4, 1), unit(4, 2), scale]
    ids = torch.arange(4)
    fresh = build_objective(config, World())(Embeddings(*inputs), sample_ids=ids)
    objective = build_objective(config, World())
    objective(Embeddings(*inputs), sample_ids=torch.tensor([0, 1, 2, 3]))
    again = objective(Embeddings(*inputs), sample_ids=ids)
    # Of the four queued pairs, each anchor's own is masked and the other three count a second time.
    logits = scale.exp() * inputs[0] @ inputs[1].T
    doubled = logits + torch.log(2.0 - torch.eye(4, dtype=torch.float64))
    want = 0.5 * (cross_entropy(doubled, ids) + cross_entropy(doubled.T, ids))
    torch.testing.assert_close(again.total, want, rtol=1e-12, atol=1e-12)
    assert fresh.total < again.total


def test_image_image_term_is_simclrs() -> None:
    inputs, view = leaves()[:3], unit(N, 5)
    config = {"name": "clip", "image_image": {"weight": 0.7, "temperature": 0.2}}
    got = build_objective(config, World(), tile=(4, 4))(Embeddings(*inputs, image_view=view)).total
    both = torch.cat([inputs[0], view])
    logits = (both @ both.T / 0.2).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    want = ours({"name": "clip"}, inputs) + 0.7 * cross_entropy(logits, torch.arange(2 * N).roll(N))
    assert_same(got, want, [*inputs, view])


def test_several_captions_average_one_loss_for_each_positive() -> None:
    image, text, scale = unit(4, 1), unit(7, 2), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([2, 0, 0, 1, 3, 3, 3])
    got = build_objective({"name": "clip"}, World(), tile=(2, 3))(
        Embeddings(image, text, scale, text_owner=owner)
    ).total
    logits = scale.exp() * image @ text.T
    image_losses, text_losses = [], []
    for i in range(4):
        others = logits[i][owner != i]
        own = logits[i][owner == i]
        image_losses.append(torch.stack([torch.cat([z[None], others]).logsumexp(0) - z for z in own]).mean())
    for j, i in enumerate(owner.tolist()):
        text_losses.append(logits[:, j].logsumexp(0) - logits[i, j])
    want = 0.5 * (torch.stack(image_losses).mean() + torch.stack(text_losses).mean())
    assert_same(got, want, [image, text, scale])


def test_an_image_answers_to_the_ids_of_all_its_captions() -> None:
    image, text, scale = unit(3, 1), unit(5, 2), torch.tensor(2.0, dtype=torch.float64)
    owner = torch.tensor([0, 0, 1, 2, 2])
    # Caption 1, of image 0, says what caption 3, of image 2, says: no negatives of the other's image.
    caption_ids = torch.stack([owner + 100, torch.tensor([10, 11, 12, 11, 14])], 1)
    got = build_objective({"name": "clip"}, World(), tile=(2, 2))(
        Embeddings(image, text, scale, text_owner=owner), sample_ids=caption_ids
    )
    blocked = torch.zeros(3, 5, dtype=torch.bool)
    blocked[0, 3] = blocked[2, 1] = True
    logits = scale.exp() * image @ text.T
    image_side = []
    for i in range(3):
        others = logits[i][(owner != i) & ~blocked[i]]
        image_side.append(
            torch.stack([torch.cat([z[None], others]).logsumexp(0) - z for z in logits[i][owner == i]]).mean()
        )
    text_side = [logits[~blocked[:, j], j].logsumexp(0) - logits[i, j] for j, i in enumerate(owner.tolist())]
    want = 0.5 * (torch.stack(image_side).mean() + torch.stack(text_side).mean())
    torch.testing.assert_close(got.total, want, rtol=1e-12, atol=1e-12)


def test_individual_temperatures_follow_isogclr() -> None:
    """Two steps of the paper's algorithm, by autograd on its own formulas."""
    gamma, rho, lr, tau_0 = 0.6, 3.0, 0.02, 0.2
    config = {
        "name": "clip",
        "individual_temperature": {"gamma": gamma, "rho": rho, "lr": lr, "tau_init": tau_0},
    }
    objective = build_objective(config, World(), tile=(4, 4))
    index = torch.arange(N) * 3
    u: dict[int, Tensor] = {}
    tau = {side: torch.full((N,), tau_0, dtype=torch.float64) for side in (0, 1)}
    for step in range(2):
        image, text, scale = unit(N, 10 + step), unit(N, 20 + step), torch.tensor(2.0, dtype=torch.float64)
        got = objective(Embeddings(image, text, scale), sample_index=index).total
        total, new_tau = torch.zeros((), dtype=torch.float64), {}
        for side, cosines in ((0, image @ text.T), (1, text @ image.T)):
            t = tau[side].clone().requires_grad_()
            gap = (cosines - cosines.diagonal()[:, None]) / t[:, None]
            g = gap.exp().masked_fill(torch.eye(N, dtype=torch.bool), 0.0).sum(1) / (N - 1)
            u[side] = g.detach() if side not in u else (1 - gamma) * u[side] + gamma * g.detach()
            estimator = (t * g / u[side]).sum()
            slope = (
                u[side].log()
                + rho
                + torch.autograd.grad((t.detach() * g / u[side]).sum(), t, retain_graph=True)[0]
            )
            new_tau[side] = (tau[side] - lr * slope).clamp(0.01, 1.0)
            surrogate = estimator - estimator.detach() + (tau[side] * (u[side].log() + rho)).sum()
            total = total + surrogate / (2 * N)
        tau = new_tau
        assert_same(got, total, [image, text], 1e-11)


def test_mixed_negatives_are_unit_norm_mixtures_of_the_hardest() -> None:
    """With top_k = 2, count = 0 and one negative pair left, every draw is known but the share; bounds hold
    for any share.
    """
    config = {"name": "dcl", "mixing": {"top_k": 2, "count": 40, "query_count": 0}}
    image, text, scale = unit(3, 1), unit(3, 2), torch.tensor(1.0, dtype=torch.float64)
    plain = build_objective({"name": "dcl"}, World())(Embeddings(image, text, scale))
    mixed = build_objective(config, World())(Embeddings(image, text, scale))
    again = build_objective(config, World())(Embeddings(image, text, scale))
    assert torch.equal(mixed.total, again.total)
    # A mixture of two unit vectors is at least as close to the anchor as the farther of the two.
    logits = scale.exp() * image @ text.T
    off = ~torch.eye(3, dtype=torch.bool)
    lowest = [
        torch.cat([z[keep], z[keep].min().expand(40)]).logsumexp(0) - z[~keep][0]
        for table in (logits, logits.T)
        for z, keep in zip(table, off, strict=True)
    ]
    assert mixed.total > torch.stack(lowest).mean()
    assert mixed.total > plain.total


def test_mixing_gradient_is_that_of_the_value_with_the_mixtures_held() -> None:
    config = {"name": "clip", "mixing": {"top_k": 3, "count": 4, "query_count": 3}}
    image, text, scale = unit(6, 1), unit(6, 2), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    total = build_objective(config, World(), tile=(2, 4))(Embeddings(image, text, scale)).total
    (grad,) = torch.autograd.grad(total, scale)
    values = [
        build_objective(config, World())(Embeddings(image, text, scale.detach() + step)).total
        for step in (1e-5, -1e-5)
    ]
    assert float(grad) == pytest.approx((values[0].item() - values[1].item()) / 2e-5, rel=1e-7)
