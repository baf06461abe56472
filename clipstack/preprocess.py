"""Pixels and text as a model wants them, built from the model's own record; training, evaluation and
serving share it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import clipstack.torchvision_compat  # noqa: F401 - must come before torchvision and open_clip

import numpy as np  # isort: skip
import numpy.typing as npt  # isort: skip
import torch  # isort: skip
from open_clip import image_transform  # isort: skip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer  # isort: skip
from PIL import Image  # isort: skip
from torch import Tensor  # isort: skip
from torchvision.transforms import Compose, InterpolationMode, v2  # isort: skip
from torchvision.transforms.v2 import functional as F  # isort: skip

from clipstack.config.models import AugmentConfig
from data_pipelines.images import draw_geometry

CACHED_CAPTIONS = 2**16
"""Captions whose tokens a process keeps: the tokenizer is pure Python, and captions repeat."""


class Record(Protocol):
    """The two tables of an open_clip_config.json."""

    @property
    def model_cfg(self) -> dict[str, Any]: ...

    @property
    def preprocess_cfg(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Preprocess:
    """What happens to images and captions before the towers see them."""

    image_size: tuple[int, int]
    """(height, width) in pixels"""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    context_length: int = 77
    tokenizer_name: str | None = None
    """A Hugging Face tokenizer, by name or folder; None: open_clip's SimpleTokenizer."""
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @classmethod
    def from_record(
        cls, record: Record, *, augment: AugmentConfig | None = None, tokenizer_dir: Path | None = None
    ) -> Preprocess:
        """`tokenizer_dir`: where an exported model keeps the files of a Hugging Face tokenizer."""
        text, image = record.model_cfg["text_cfg"], record.preprocess_cfg
        name = text.get("hf_tokenizer_name") or None
        return cls(
            image_size=_pair(image["size"]),
            mean=_triple(image["mean"]),
            std=_triple(image["std"]),
            interpolation=image.get("interpolation", "bicubic"),
            resize_mode=image.get("resize_mode", "shortest"),
            fill_color=image.get("fill_color", 0),
            context_length=int(text.get("context_length", 77)),
            tokenizer_name=str(tokenizer_dir) if name and tokenizer_dir else name,
            tokenizer_kwargs=dict(text.get("tokenizer_kwargs", {})),
            augment=augment or AugmentConfig(),
        )

    def train_image(self, pixels: npt.NDArray[np.uint8], rng: random.Random) -> Tensor:
        """(H, W, 3) uint8 -> (3, height, width) uint8, augmented by what `rng` draws and nothing else."""
        height, width = pixels.shape[:2]
        augment = self.augment
        box, flip = draw_geometry(
            width, height, scale=augment.crop_scale, ratio=augment.crop_ratio, hflip=augment.hflip, rng=rng
        )
        # Permuted, not copied: torchvision's uint8 resize is fastest on channels-last memory.
        image = _as_tensor(pixels).permute(2, 0, 1)  # (3, H, W)
        image = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
        if image.shape[1:] != self.image_size:
            image = F.resize_image(image, list(self.image_size), interpolation=self._mode, antialias=True)
        if flip:
            image = F.horizontal_flip_image(image)
        if self._random_changes is not None:
            image = self._change(image, rng)
        return image.contiguous()

    def eval_image(self, image: Image.Image) -> Tensor:
        """-> (3, height, width) float32, normalised: open_clip's own transform."""
        out: Tensor = self._eval_transform(image)
        return out

    def eval_pixels(self, image: Image.Image) -> Tensor:
        """-> (3, height, width) uint8: open_clip's own transform up to normalisation, which `normalize`
        does."""
        sized = Compose(self._eval_transform.transforms[:-2])(image)
        return _as_tensor(np.asarray(sized)).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 on any device -> float32, as ToTensor and Normalize would, to the bit."""
        mean, std = self._mean_std(images.device)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(N,) texts -> (N, context_length) int64, cut where they are longer."""
        if not captions:
            return torch.empty((0, self.context_length), dtype=torch.int64)
        return torch.stack([self._tokens(caption) for caption in captions])

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer of this model: a list of texts -> (N, context_length) int64."""
        if self.tokenizer_name is not None:
            return HFTokenizer(
                self.tokenizer_name, context_length=self.context_length, **self.tokenizer_kwargs
            )
        return SimpleTokenizer(context_length=self.context_length, **self.tokenizer_kwargs)

    @cached_property
    def _tokens(self) -> Any:
        tokenizer = self.tokenizer  # not through self, here and below: a cycle outlives a replaced model
        return lru_cache(CACHED_CAPTIONS)(lambda caption: tokenizer([caption])[0])

    @cached_property
    def _mode(self) -> InterpolationMode:
        return InterpolationMode.BILINEAR if self.interpolation == "bilinear" else InterpolationMode.BICUBIC

    @cached_property
    def _eval_transform(self) -> Compose:
        return image_transform(
            self.image_size,
            is_train=False,
            mean=self.mean,
            std=self.std,
            resize_mode=self.resize_mode,
            interpolation=self.interpolation,
            fill_color=self.fill_color,
        )

    @cached_property
    def _mean_std(self) -> Any:
        mean, std = self.mean, self.std
        return lru_cache(8)(lambda device: (_column(mean, device), _column(std, device)))

    @cached_property
    def _random_changes(self) -> v2.Compose | None:
        changes = list(_random_changes(self.augment))
        return v2.Compose(changes) if changes else None

    def _change(self, image: Tensor, rng: random.Random) -> Tensor:
        # torchvision draws from the global generator: it is lent the sample's seed and gets its own state
        # back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.getrandbits(63))
            assert self._random_changes is not None
            out: Tensor = self._random_changes(image)
            return out

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def _random_changes(augment: AugmentConfig) -> Iterable[torch.nn.Module]:
    if augment.rand_augment:
        yield v2.RandAugment(augment.rand_augment, augment.rand_augment_magnitude)
    if augment.color_jitter is not None:
        brightness, contrast, saturation, hue = augment.color_jitter
        jitter = v2.ColorJitter(brightness, contrast, saturation, hue)
        yield v2.RandomApply([jitter], p=augment.color_jitter_prob)
    if augment.gray_prob:
        yield v2.RandomGrayscale(augment.gray_prob)


def _as_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    # Pillow lends read-only memory, which torch would warn about.
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def _column(values: tuple[float, float, float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
