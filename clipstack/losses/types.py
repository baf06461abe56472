"""What an encoder hands to an objective, and what an objective hands back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Embeddings(NamedTuple):
    """Unit-norm features of one rank's share of the batch.

    image: (B, D). text: (B, D), or (B*P, D) with several captions an image. logit_scale: () the LOG of the
    scale. logit_bias: () or None. image_view: (B, D), a second view of each image, for image-image terms.
    text_owner: (B*P,) int64, the row of the image that each caption belongs to; None: caption i to image i.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    image_view: Tensor | None = None
    text_owner: Tensor | None = None


class LossOutput(NamedTuple):
    """total: (), the scalar to differentiate. terms: detached scalars to log, by name."""

    total: Tensor
    terms: dict[str, Tensor]
