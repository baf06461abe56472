"""What a step hands in: checked on all ranks together, and brought into the form that the engine needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipstack.errors import ConfigError
from clipstack.losses.tiles import Exclusions, accumulation_dtype
from clipstack.losses.types import Embeddings
from clipstack.world import World

NORM_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far from 1 a feature's norm may be, by dtype; 1e-3 for the others."""


class EmbeddingsError(ConfigError, ValueError):
    """Features or ids that no objective can use. Raised on every rank, whichever rank they came from."""


class NonFiniteError(EmbeddingsError):
    """NaN or infinity in what was handed in or in the loss: a step to skip, not a mistake in the recipe."""


@dataclass(frozen=True)
class Inputs:
    """One rank's share of a step, sound, with the ids that decide which pairs are negatives.

    image (B, D), text (B', D); scale () in the accumulation dtype; owner (B',) or None as in
    Embeddings.text_owner. row_ids (B, R), col_ids (B', R): a pair is no negative if any of the R ids agree;
    the first is the place in the global batch. sample_index: (B,) or None. uses_ids: duplicates are masked.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    view: Tensor | None
    owner: Tensor | None
    row_ids: Tensor
    col_ids: Tensor
    sample_index: Tensor | None
    world: World
    tile: tuple[int, int]

    @property
    def acc(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def batch_size(self) -> int:
        """Images in the global batch."""
        return self.world.size * len(self.image)

    def exclusions(self) -> Exclusions:
        """Collective."""
        return Exclusions(self.row_ids, self.world.all_gather(self.col_ids), self.tile)

    def image_mean(self, per_text: Tensor) -> Tensor:
        """(B',) one value for each positive pair -> (): mean over an image's captions, then over images."""
        if self.owner is None:
            return per_text.mean()
        captions = torch.bincount(self.owner, minlength=len(self.image))
        return (per_text / captions[self.owner]).sum() / len(self.image)

    def of_owner(self, per_image: Tensor) -> Tensor:
        """(B, ...) a value for each image -> (B', ...) for each caption."""
        return per_image if self.owner is None else per_image[self.owner]


def check(
    embeddings: Embeddings,
    sample_ids: Tensor | None,
    sample_index: Tensor | None,
    *,
    world: World,
    tile: tuple[int, int],
    mask_duplicates: bool,
) -> Inputs:
    """The inputs of this rank, after all ranks agreed that every rank's are sound and of equal shape.
    Collective.

    Raises EmbeddingsError on every rank when one rank's features or ids cannot be used, NonFiniteError when
    they are not finite.
    """
    problem = _shape_problem(embeddings, sample_ids, sample_index)
    widest = 1
    if problem is None:
        problem = _value_problem(embeddings)
        widest = 1 if embeddings.text_owner is None else int(torch.bincount(embeddings.text_owner).max())
    widest = _agree(problem, embeddings, sample_ids, sample_index, widest, world)
    own_place = torch.arange(len(embeddings.image), device=embeddings.image.device) + world.rank * len(
        embeddings.image
    )
    owner = embeddings.text_owner
    places = (own_place, own_place if owner is None else own_place[owner])
    row_ids, col_ids = ([place] for place in places)
    if sample_ids is not None and mask_duplicates:
        for row, col in _id_columns(sample_ids.to(own_place.device), owner, len(embeddings.image), widest):
            row_ids.append(row)
            col_ids.append(col)
    return Inputs(
        image=embeddings.image,
        text=embeddings.text,
        scale=embeddings.logit_scale.reshape(()).to(accumulation_dtype(embeddings.image.dtype)).exp(),
        bias=None if embeddings.logit_bias is None else embeddings.logit_bias.reshape(()),
        view=embeddings.image_view,
        owner=owner,
        row_ids=torch.stack(row_ids, 1),
        col_ids=torch.stack(col_ids, 1),
        sample_index=sample_index,
        world=world,
        tile=tile,
    )


def _id_columns(
    sample_ids: Tensor, owner: Tensor | None, num_images: int, widest: int
) -> list[tuple[Tensor, Tensor]]:
    """(ids of the images, ids of the captions) of each kind of id, so that equality anywhere means: not a
    negative.

    With one row of ids for each caption, an image answers to the captions of all its texts: up to `widest` of
    them.
    """
    ids = sample_ids if sample_ids.dim() == 2 else sample_ids[:, None]
    if owner is None:
        return [(column, column) for column in ids.T]
    if len(ids) == num_images:
        return [(column, column[owner]) for column in ids.T]
    order = torch.argsort(owner, stable=True)
    first = torch.searchsorted(owner[order], torch.arange(num_images, device=owner.device))
    captions = torch.bincount(owner, minlength=num_images)
    columns = [(ids[order[first], 0], ids[:, 0])]
    for nth in range(widest):
        # An image with fewer captions repeats its last one.
        caption = order[first + torch.clamp(captions - 1, max=nth)]
        columns += [(column[caption], column) for column in ids.T[1:]]
    return columns


def _shape_problem(
    embeddings: Embeddings, sample_ids: Tensor | None, sample_index: Tensor | None
) -> str | None:
    image, text, owner = embeddings.image, embeddings.text, embeddings.text_owner
    if image.dim() != 2 or len(image) == 0 or not image.is_floating_point():
        return f"image: {_look(image)}; give floating-point features of shape (B, D), B >= 1"
    if text.dim() != 2 or text.shape[1] != image.shape[1] or text.dtype != image.dtype:
        return f"text: {_look(text)}; give features of image's dtype and width, {_look(image)}"
    if owner is None and len(text) != len(image):
        return (
            f"text: {len(text)} captions for {len(image)} images; give text_owner, the image of each caption"
        )
    if owner is not None:
        if owner.shape != (len(text),) or owner.is_floating_point():
            return f"text_owner: {_look(owner)}; give one integer for each of the {len(text)} captions"
        if int(owner.min()) < 0 or len(torch.unique(owner)) != len(image) or int(owner.max()) >= len(image):
            return f"text_owner: give numbers from 0 to {len(image) - 1}, each image's at least once"
    if embeddings.logit_scale.numel() != 1:
        return f"logit_scale: {_look(embeddings.logit_scale)}; give one number, the log of the scale"
    if embeddings.image_view is not None and embeddings.image_view.shape != image.shape:
        return (
            f"image_view: {_look(embeddings.image_view)}; give one second view of each image, {_look(image)}"
        )
    if sample_ids is not None:
        allowed = {len(image)} if owner is None else {len(image), len(text)}
        if sample_ids.dim() not in (1, 2) or len(sample_ids) not in allowed or sample_ids.is_floating_point():
            return f"sample_ids: {_look(sample_ids)}; give int64 ids of shape ({len(image)}, C)"
    if sample_index is not None and (sample_index.shape != (len(image),) or sample_index.is_floating_point()):
        return f"sample_index: {_look(sample_index)}; give int64 positions in the data set, ({len(image)},)"
    return None


def _look(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _value_problem(embeddings: Embeddings) -> str | None:
    """Norms and scale, in one transfer from the device. Messages about values that are not finite start with
    NONFINITE.
    """
    named = {"image": embeddings.image, "text": embeddings.text, "image_view": embeddings.image_view}
    features = {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
    worst = [
        (torch.linalg.vector_norm(tensor, dim=1, dtype=accumulation_dtype(tensor.dtype)) - 1)
        .abs()
        .max()
        .double()
        for tensor in features.values()
    ]
    scale = embeddings.logit_scale.detach().reshape(()).double()
    bias = (
        torch.zeros_like(scale)
        if embeddings.logit_bias is None
        else embeddings.logit_bias.detach().reshape(()).double()
    )
    *gaps, log_scale, log_bias = torch.stack([*worst, scale, bias]).tolist()
    for (name, tensor), gap in zip(features.items(), gaps, strict=True):
        if not gap < float("inf"):
            return (
                f"{NONFINITE}{name}: features with NaN or infinity; lower the learning rate or mend the batch"
            )
        if gap > NORM_TOLERANCE.get(tensor.dtype, 1e-3):
            return f"{name}: a feature's norm differs from 1 by {gap:.3g}; normalise features to unit norm"
    for name, value in (("logit_scale", log_scale), ("logit_bias", log_bias)):
        if not abs(value) < float("inf"):
            return f"{NONFINITE}{name} = {value}: not a finite number; lower the learning rate"
    if abs(log_scale) > MAX_LOG_SCALE:
        return f"logit_scale = {log_scale:.4g}: give the LOG of the scale, at most {MAX_LOG_SCALE:g}"
    return None


NONFINITE = "non-finite "
MAX_LOG_SCALE = 10.0
"""A scale beyond e^10 would be a scale given in place of its log."""


NUM_FACTS = 11


def _agree(
    problem: str | None,
    embeddings: Embeddings,
    sample_ids: Tensor | None,
    sample_index: Tensor | None,
    widest: int,
    world: World,
) -> int:
    """Raise on all ranks if one rank has a problem or its shapes are its own; else the most captions of an
    image anywhere.
    """
    facts = (
        {}
        if problem is not None
        else {
            "image rows": len(embeddings.image),
            "text rows": len(embeddings.text),
            "feature width": embeddings.image.shape[-1],
            "dtype size": embeddings.image.element_size(),
            "sample_ids columns": -1
            if sample_ids is None
            else sample_ids.reshape(len(sample_ids), -1).shape[1],
            "sample_ids rows": -1 if sample_ids is None else len(sample_ids),
            "sample_index": int(sample_index is not None),
            "image_view": int(embeddings.image_view is not None),
            "text_owner": int(embeddings.text_owner is not None),
        }
    )
    row = [int(problem is not None), widest, *facts.values()]
    mine = torch.tensor([row + [0] * (NUM_FACTS - len(row))], device=world.device)
    table: list[list[int]] = world.all_gather(mine).tolist()  # collective
    if any(row[0] for row in table):
        problems = world.gather_objects(
            problem
        )  # collective; every rank is here, since all saw the same table
        rank, first = next((rank, text) for rank, text in enumerate(problems) if text is not None)
        message = first if world.size == 1 else f"{first} (rank {rank})"
        raise (NonFiniteError if first.startswith(NONFINITE) else EmbeddingsError)(message)
    for column, name in enumerate(facts, start=2):
        values = [row[column] for row in table]
        if len(set(values)) > 1:
            raise EmbeddingsError(
                f"{name}: unequal over ranks, {values}; give all the same (drop a partial batch)"
            )
    if world.size * len(embeddings.image) == 1:
        raise EmbeddingsError("image: a batch of 1 has no negatives; use a batch size of at least 2")
    return max(row[1] for row in table)
