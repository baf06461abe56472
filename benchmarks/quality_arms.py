"""The ways to train that benchmarks/quality.py compares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A way to train. changes: dotted keys of the recipe and their values; peer: open_clip's own trainer."""

    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    peer: bool = False


def _hard(**options: Any) -> dict[str, Any]:
    return {"objective": {"name": "hard_negative", **options}}


def _unmasked() -> dict[str, Any]:
    return {"name": "clip", "mask_duplicates": False}


BASE, PEER = "clip", "open_clip"
CORE = {
    BASE: Arm(
        "configs/cifar10.toml as it is: objective clip, duplicates masked, half of the photos mirrored"
    ),
    "hard_negative": Arm("the same with hard negatives at their default beta", _hard()),
    "no_masking": Arm("the same as clip, duplicates counted as negatives", {"objective": _unmasked()}),
    "like_open_clip": Arm(
        "ours with all that open_clip's trainer cannot do turned off: no masking, no mirroring",
        {"objective": _unmasked(), "data.augment.hflip": False},
    ),
    PEER: Arm("open_clip's own trainer, its flags set to the recipe's values", peer=True),
}
FULL = {
    **{f"beta_{beta}": Arm(f"hard negatives, beta {beta}", _hard(beta=beta)) for beta in (0.1, 0.5, 1.0)},
    "beta_late": Arm("hard negatives in the last third", _hard(warmup_fraction=2 / 3, ramp_fraction=0.1)),
    "beta_no_masking": Arm("hard negatives, duplicates not masked", _hard(mask_duplicates=False)),
    "hard_debiased": Arm("hard negatives with tau_plus 0.1", _hard(tau_plus=0.1)),
    "debiased": Arm("debiased", {"objective": {"name": "debiased"}}),
    "dcl": Arm("decoupled", {"objective": {"name": "dcl"}}),
    "siglip": Arm(
        "sigmoid, from its own scale of 10",
        {"objective": {"name": "siglip"}, "model.init_logit_scale": math.log(10)},
    ),
    "smoothing": Arm("clip, label smoothing 0.1", {"objective": {"name": "clip", "label_smoothing": 0.1}}),
    "no_mirror": Arm("clip, no mirroring", {"data.augment.hflip": False}),
    "no_augment": Arm(
        "clip, no augmentation", {"data.augment.hflip": False, "data.augment.crop_scale": [1.0, 1.0]}
    ),
    "strong_augment": Arm(
        "clip, crops from 0.35, colours jittered",
        {"data.augment.crop_scale": [0.35, 1.0], "data.augment.color_jitter": [0.4, 0.4, 0.4, 0.1]},
    ),
}  # fmt: skip
ON_SHAPES = (BASE, "hard_negative", "no_masking", "beta_0.1", "beta_0.5", "beta_late", "dcl", "smoothing")
ARMS = CORE | FULL
IN_EQUAL_TIME = (BASE, "hard_negative", "no_masking", "like_open_clip")
