"""Tiled retrieval against the whole matrix, sorted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipstack.retrieval import Ranks, median_rank, recall_at, retrieval_metrics, retrieval_ranks


def sorted_ranks(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> Ranks:
    """By a stable sort of the whole matrix."""
    scores = images @ texts.T
    by_text = scores.argsort(dim=1, descending=True, stable=True)
    by_image = scores.T.argsort(dim=1, descending=True, stable=True)
    image_to_text = [int((owner[order] == row).nonzero()[0]) for row, order in enumerate(by_text)]
    text_to_image = [int((order == own).nonzero()) for order, own in zip(by_image, owner, strict=True)]
    return Ranks(np.array(image_to_text), np.array(text_to_image))


def features(
    num_images: int, owner: torch.Tensor, *, dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, so that every product is exact, whatever the order of its sums."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(-3, 4, (num_images, dim), generator=rng).float()
    texts = images[owner] + torch.randint(-4, 5, (len(owner), dim), generator=rng)
    return images, texts


@pytest.mark.parametrize("tile", [1, 7, 16, 1000])
@pytest.mark.parametrize("dim", [1, 2, 24])  # few dimensions: many equal similarities
def test_ranks_equal_those_of_a_stable_sort(tile: int, dim: int) -> None:
    owner = torch.arange(40).repeat_interleave(torch.arange(40) % 3 + 1)
    images, texts = features(40, owner, dim=dim)
    ours, expected = retrieval_ranks(images, texts, owner, tile=tile), sorted_ranks(images, texts, owner)
    assert (ours.image_to_text == expected.image_to_text).all()
    assert (ours.text_to_image == expected.text_to_image).all()


def test_captions_may_come_in_any_order() -> None:
    owner = torch.randperm(90, generator=torch.Generator().manual_seed(2)) % 30
    images, texts = features(30, owner, dim=3)
    ours, expected = retrieval_ranks(images, texts, owner, tile=8), sorted_ranks(images, texts, owner)
    assert (ours.image_to_text == expected.image_to_text).all()
    assert (ours.text_to_image == expected.text_to_image).all()


def test_float_features_give_what_the_whole_matrix_gives() -> None:
    rng = torch.Generator().manual_seed(4)
    images = normalize(torch.randn(500, 32, generator=rng), dim=1)
    texts = normalize(images + 0.9 * torch.randn(500, 32, generator=rng), dim=1)
    metrics = retrieval_metrics(retrieval_ranks(images, texts, tile=64))
    scores = images @ texts.T
    for k in (1, 5, 10):
        found = (scores.topk(k, dim=1).indices == torch.arange(500)[:, None]).any(dim=1)
        assert metrics[f"image_to_text_r{k}"] == float(found.double().mean())
        found = (scores.T.topk(k, dim=1).indices == torch.arange(500)[:, None]).any(dim=1)
        assert metrics[f"text_to_image_r{k}"] == float(found.double().mean())


def test_a_model_that_sees_no_difference_scores_chance() -> None:
    ranks = retrieval_ranks(torch.ones(50, 8), torch.ones(50, 8), tile=16)
    assert recall_at(ranks.image_to_text, 1) == recall_at(ranks.text_to_image, 1) == 1 / 50
    assert median_rank(ranks.image_to_text) == 25.5


def test_an_image_without_a_caption_is_no_input() -> None:
    for owner, message in (
        ([0, 0, 2], "image 1 has no text"),
        ([0, 1, 3], "names image 3 of 3"),
        ([0, 1], "2 numbers for 3"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval_ranks(torch.ones(3, 2), torch.ones(3, 2), torch.tensor(owner))
