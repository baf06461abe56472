"""Draws the plots of docs/objectives.md from the objectives themselves.

python benchmarks/plot_objectives.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.losses import Embeddings, LossOutput, build_objective
from clipstack.losses.rows import RowLoss
from clipstack.world import World

OUT = Path(__file__).resolve().parents[1] / "docs" / "plots"
PAIRS, DIM = 640, 64


def main() -> None:
    # Equal files from equal runs: no date, no random ids.
    plt.rcParams.update(
        {"svg.hashsalt": "clipstack", "svg.fonttype": "none", "font.size": 9, "figure.dpi": 72}
    )
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
        draw(axes)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(OUT / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(OUT / f"{name}.svg")


def pairs() -> tuple[Tensor, Tensor]:
    """Features as in the middle of a training: positives at a cosine near 0.6, all of them in a cone."""
    generator = torch.Generator().manual_seed(0)
    shared, own, *noises = (
        torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (1, PAIRS, PAIRS, PAIRS)
    )
    image, text = (normalize(0.5 * shared + own + 0.9 * noise, dim=1) for noise in noises)
    return image, text


def run(config: dict[str, Any], logit_scale: float) -> tuple[LossOutput, Tensor]:
    """(output, gradient of the log scale)."""
    scale = torch.tensor(logit_scale, dtype=torch.float64, requires_grad=True)
    out = build_objective(config, World())(Embeddings(*pairs(), scale))
    (slope,) = torch.autograd.grad(out.total, scale)
    return out, slope


def draw_weights(axes: Axes) -> None:
    """How hard one anchor is pushed from a negative: the gradient of its loss by the negative's cosine."""
    cosines = torch.linspace(-0.3, 0.6, 91, dtype=torch.float64)
    curves = {
        "clip": {"name": "clip"},
        "hard_negative, beta 0.5": {"name": "hard_negative", "beta": 0.5},
        "hard_negative, beta 1": {"name": "hard_negative", "beta": 1.0},
        "beta 1, detach_weights": {"name": "hard_negative", "beta": 1.0, "detach_weights": True},
    }
    for label, config in curves.items():
        axes.plot(cosines, push_by_cosine(config, cosines), label=label)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="cosine of the negative", ylabel="push (negative: pull)")
    axes.set_yscale("symlog", linthresh=1e-3)


def push_by_cosine(config: dict[str, Any], cosines: Tensor) -> Tensor:
    """d(loss of one anchor) / d(cosine), with one negative at each of the cosines and the positive at 0.6."""
    row_loss = RowLoss(config.get("beta", 0.0), detach_weights=config.get("detach_weights", False))
    scale = torch.tensor(14.3, dtype=torch.float64)
    leaf = cosines.clone().requires_grad_()
    lse = torch.stack([(kappa * leaf).logsumexp(0) for kappa, _ in row_loss.kappas(scale.item())])[None]
    count = torch.tensor([float(len(cosines))], dtype=torch.float64)
    (push,) = torch.autograd.grad(row_loss(0.6 * scale[None], lse, count, scale).sum(), leaf)
    return push


def draw_effective_negatives(axes: Axes) -> None:
    scales = torch.linspace(math.log(5), math.log(100), 25)
    curves = {
        "beta 0 (clip)": {"beta": 0.0},
        "beta 0.25": {"beta": 0.25},
        "beta 0.5": {"beta": 0.5},
        "beta 1": {"beta": 1.0},
        "beta 5, cosine": {"beta": 5.0, "beta_mode": "cosine"},
    }
    for label, fields in curves.items():
        counts = [
            run({"name": "hard_negative", **fields}, float(s))[0].terms["effective_negatives"] for s in scales
        ]
        axes.plot(scales.exp(), torch.stack(counts), label=label)
    axes.set(xlabel="scale", ylabel=f"effective negatives of {PAIRS - 1}", xscale="log", yscale="log")


def draw_temperature(axes: Axes) -> None:
    """Where the slope crosses zero, the temperature rests; alpha = 0 never does."""
    scales = torch.linspace(math.log(2), math.log(100), 30)
    curves = {
        "alpha 1 (clip)": {"alpha": 1.0},
        "alpha 0.5": {"alpha": 0.5},
        "alpha 0.1": {"alpha": 0.1},
        "alpha 0 (dcl)": {"alpha": 0.0},
    }
    for label, fields in curves.items():
        slopes = [run({"name": "hard_negative", "beta": 0.0, **fields}, float(s))[1] for s in scales]
        axes.plot(scales.exp(), torch.stack(slopes), label=label)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="scale", ylabel="slope of the loss by the log scale", xscale="log")
    axes.set_yscale("symlog", linthresh=0.1)


def draw_debiasing(axes: Axes) -> None:
    """Share of anchors at the floor of the debiased estimate, whose negatives get no gradient."""
    tau_plus = [0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2]
    for scale in (14.3, 50.0, 100.0):
        shares = [floored_share(tau, math.log(scale)) for tau in tau_plus]
        axes.plot(tau_plus, shares, marker="o", label=f"scale {scale:g}")
    axes.set_xscale("symlog", linthresh=3e-4)
    axes.set(xlabel="tau_plus", ylabel="share of anchors at the floor", ylim=(0, 1))


def floored_share(tau_plus: float, logit_scale: float) -> float:
    image, text = pairs()
    logits = math.exp(logit_scale) * image @ text.T
    others = logits.masked_fill(torch.eye(PAIRS, dtype=torch.bool), -math.inf)
    # R <= N (tau e^z + (1 - tau) e^-s), in logs.
    expected = logits.diagonal() + math.log(max(tau_plus, 1e-300))
    least = torch.tensor(math.log1p(-tau_plus) - math.exp(logit_scale))
    kept = others.logsumexp(1) > math.log(PAIRS - 1) + torch.logaddexp(expected, least)
    return 1 - float(kept.double().mean())


PLOTS: dict[str, Callable[[Axes], None]] = {
    "objective-push": draw_weights,
    "objective-effective-negatives": draw_effective_negatives,
    "objective-temperature": draw_temperature,
    "objective-debiasing": draw_debiasing,
}

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main()
