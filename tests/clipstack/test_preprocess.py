"""Preprocessing against open_clip's own, to the bit where it must be and in decibels where it may differ."""

from __future__ import annotations

import io
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as torchvision_functional

from clipstack.config.models import AugmentConfig, ModelConfig
from clipstack.preprocess import Preprocess
from clipstack.towers import make_record
from clipstack.training.dry_run import _Measuring, cut_captions, decoded
from data_pipelines.images import crop_box, decode

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
RECORD = make_record(ModelConfig(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT))


def photo(width: int = 61, height: int = 47) -> np.ndarray:
    noise = np.random.default_rng(width).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_open_clips_transform_to_the_bit(
    resize_mode: str, size: int | tuple[int, int], interpolation: str
) -> None:
    cfg = {**RECORD.preprocess_cfg, "size": size, "resize_mode": resize_mode, "interpolation": interpolation}
    theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), is_train=False)
    ours = Preprocess.from_record(replace(RECORD, preprocess_cfg=cfg))
    for image in (Image.fromarray(photo()), Image.fromarray(photo(20, 90))):
        assert torch.equal(ours.eval_image(image), theirs(image))
        assert torch.equal(ours.normalize(ours.eval_pixels(image)), theirs(image))


def test_tokens_are_the_models_own() -> None:
    ours = Preprocess.from_record(RECORD)
    captions = ["A photo of a Dog.", "", "word " * 40, "naïve café ☃", "A photo of a Dog."]
    expected = open_clip.SimpleTokenizer(context_length=16)(captions)
    assert torch.equal(ours.tokenize(captions), expected)
    assert ours.tokenize([]).shape == (0, 16)


def test_training_images_depend_on_their_own_seed_and_disturb_no_generator() -> None:
    augment = AugmentConfig(
        crop_scale=(0.4, 1), hflip=True, color_jitter=(0.4, 0.4, 0.4, 0.1), gray_prob=0.2, rand_augment=2
    )
    ours = Preprocess.from_record(RECORD, augment=augment)
    before = torch.random.get_rng_state()
    first = [ours.train_image(photo(), random.Random(seed)) for seed in range(30)]
    torch.manual_seed(99)
    again = [ours.train_image(photo(), random.Random(seed)) for seed in range(30)]
    torch.random.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.numpy().tobytes() for image in first}) == 30
    ours.train_image(photo(), random.Random(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_flips_come_in_half_of_the_images() -> None:
    ours = Preprocess.from_record(
        RECORD, augment=AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=True)
    )
    pixels = photo(32, 32)
    plain = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    images = [ours.train_image(pixels, random.Random(seed)) for seed in range(200)]
    flipped = sum(torch.equal(image, plain.flip(-1)) for image in images)
    assert flipped + sum(torch.equal(image, plain) for image in images) == 200
    assert 70 < flipped < 130  # 4.2 standard deviations


def test_training_crops_are_within_60_db_of_pillows_bicubic() -> None:
    shard = Path(__file__).resolve().parents[2] / "../shared/data/photos/photos-00000.tar"
    if not shard.exists():
        pytest.skip("needs the shared photos")
    from data_pipelines.index import build_index

    index = build_index(shard)
    data = shard.read_bytes()
    augment = AugmentConfig(crop_scale=(0.3, 1.0))
    ours = Preprocess.from_record(RECORD, augment=augment)
    ours = replace(ours, image_size=(224, 224))
    errors = []
    for i in range(12):
        span = index.members(i)["jpg"]
        encoded = data[span.offset : span.offset + span.size]
        pixels = decode(encoded)
        box = crop_box(
            pixels.shape[1],
            pixels.shape[0],
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            rng=random.Random(i),
        )
        reference = torchvision_functional.resized_crop(
            Image.open(io.BytesIO(encoded)).convert("RGB"),
            *box,
            [224, 224],
            interpolation=torchvision_functional.InterpolationMode.BICUBIC,
        )
        mine = ours.train_image(pixels, random.Random(i)).permute(1, 2, 0).numpy()
        errors.append(((mine.astype(float) - np.asarray(reference)) ** 2).mean())
    assert 10 * np.log10(255**2 / np.mean(errors)) >= 60


def test_a_preprocess_pickles_after_use() -> None:
    ours = Preprocess.from_record(RECORD)
    ours.tokenize(["a"])
    ours.normalize(ours.train_image(photo(), random.Random(0)))
    assert pickle.loads(pickle.dumps(ours)) == ours


def test_a_dry_run_counts_the_captions_that_are_cut() -> None:
    ours = Preprocess.from_record(RECORD)
    captions = ["x " * words for words in range(ours.context_length + 3)]
    expected = [len(ours.tokenizer.encode(caption)) + 2 > ours.context_length for caption in captions]
    assert 0 < sum(expected) < len(captions)
    assert cut_captions(torch.tensor([0, 1, 1]), 9) == (
        "cut captions     2 of 3 in the first batch are longer than model.text_cfg.context_length = 9 tokens"
    )
    measuring = pickle.loads(pickle.dumps(_Measuring.from_record(RECORD)))
    rows = measuring.tokenize(captions)
    assert rows[:, -1].tolist() == expected and torch.equal(rows[:, :-1], ours.tokenize(captions))


def test_a_dry_run_shows_the_captions_of_both_kinds_of_tokenizer() -> None:
    plain = Preprocess.from_record(RECORD).tokenizer
    assert decoded(plain, plain(["a red box"])[0].tolist()) == "a red box"

    class Wrapped:  # what open_clip's HFTokenizer holds: transformers' own
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return f" {tokens} "

    wrapper = object.__new__(open_clip.tokenizer.HFTokenizer)
    wrapper.tokenizer = Wrapped()
    assert decoded(wrapper, [5, 1, 1]) == "[5, 1, 1]"
