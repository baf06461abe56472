"""The torch runtime against open_clip's own forward."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipstack.checkpoint import load_model
from clipstack.errors import ConfigError
from serve.errors import ErrorCode, ServeError
from serve.gate import centred_cosine
from serve.images import ImageLimits, decode_image
from serve.inputs import Inputs
from serve.loading import build_runtime, load_runtime
from serve.runtime import Float32, SelfTestError
from serve.settings import Settings
from serve.torch_runtime import TorchRuntime
from serve.versions import self_test
from tests.serve.models import save_model, tiny_model
from tests.serve.pictures import encoded, picture

CPU = torch.device("cpu")
WORDS = ("red", "green", "blue", "small", "large", "round", "square", "old", "new", "bright", "dark", "quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "model", tiny_model())


@pytest.fixture(scope="module")
def runtime(folder: Path) -> TorchRuntime:
    return load(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """open_clip alone: (model, transform, tokenizer) of the same folder."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def load(folder: Path, **values: Any) -> TorchRuntime:
    settings = Settings.model_validate({"models": [str(folder)], "engine": "torch", **values})
    runtime = load_runtime(settings.models[0], settings)
    assert isinstance(runtime, TorchRuntime)
    return runtime


def cosines(ours: Float32, theirs: torch.Tensor) -> Any:
    return (ours * theirs.numpy()).sum(axis=-1)


def text_of(num_tokens: int) -> str:
    """A text that has `num_tokens` tokens, start and end included."""
    return " ".join(WORDS[n % len(WORDS)] for n in range(num_tokens - 2))


def test_text_vectors_are_those_of_open_clip_at_every_length(runtime: TorchRuntime, plain: Any) -> None:
    model, _, tokenizer = plain
    texts = ["a", "a photo of a cat", "naïve 東京 🚲", text_of(60), text_of(77)]
    tokens = [runtime.tokenize(text, truncate=False) for text in texts]
    assert [entry.count for entry in tokens[-2:]] == [60, 77]
    with torch.inference_mode():
        reference = model.encode_text(tokenizer(texts), normalize=True)
    assert cosines(runtime.encode_texts([entry.ids for entry in tokens]), reference).min() >= 0.99999


def test_image_vectors_are_those_of_open_clip(runtime: TorchRuntime, plain: Any) -> None:
    model, transform, _ = plain
    files = [encoded(picture(n, width=90 + 37 * n, height=200 - 9 * n), "JPEG") for n in range(12)]
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(io.BytesIO(data))) for data in files])
        reference = model.encode_image(batch, normalize=True)
    ours = runtime.encode_images([runtime.prepare_image(decode_image(data, ImageLimits())) for data in files])
    assert cosines(ours, reference).min() >= 0.99999
    assert centred_cosine(ours, reference.numpy()) >= 0.9999


def test_exact_preprocessing_gives_open_clip_s_pixels_to_the_bit(folder: Path) -> None:
    exact = load(folder, preprocess="exact")
    pixels = np.asarray(picture(3, width=130, height=77))
    preprocess = load_model(folder).preprocess
    sized = torch.from_numpy(exact.prepare_image(pixels))
    torch.testing.assert_close(
        preprocess.normalize(sized), preprocess.eval_image(picture(3, width=130, height=77)), rtol=0, atol=0
    )


def test_batch_composition_changes_nothing_that_matters(runtime: TorchRuntime) -> None:
    texts = [runtime.tokenize(text_of(n), truncate=False).ids for n in (3, 10, 40, 77, 5, 60)]
    images = [runtime.prepare_image(np.asarray(picture(n))) for n in range(6)]
    together = np.concatenate([runtime.encode_texts(texts), runtime.encode_images(images)])
    alone = np.concatenate(
        [runtime.encode_texts([ids]) for ids in texts] + [runtime.encode_images([i]) for i in images]
    )
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(np.linalg.norm(alone, axis=-1) - 1).max() < 1e-5


def test_texts_longer_than_the_context_are_refused_or_cut_as_open_clip_cuts(
    runtime: TorchRuntime, plain: Any
) -> None:
    with pytest.raises(ServeError) as caught:
        runtime.tokenize(text_of(78), truncate=False)
    assert caught.value.code is ErrorCode.TEXT_TOO_LONG and "78" in caught.value.message
    cut = runtime.tokenize(text_of(200), truncate=True)
    assert cut.was_cut and cut.count == 77
    np.testing.assert_array_equal(cut.ids, plain[2]([text_of(200)])[0].numpy())


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 900), (31, 33), (32, 32)])
def test_pictures_of_any_shape_become_the_model_s_size(runtime: TorchRuntime, size: tuple[int, int]) -> None:
    assert runtime.prepare_image(np.zeros((*size, 3), dtype=np.uint8)).shape == (3, 32, 32)


def test_a_very_long_picture_costs_no_memory_and_loses_nothing(runtime: TorchRuntime) -> None:
    wide = np.tile(np.asarray(picture(1, width=64, height=32)), (1, 60, 1))  # 32 x 3840
    middle = wide[:, 1920 - 64 : 1920 + 64]
    assert np.abs(runtime.prepare_image(wide).astype(int) - runtime.prepare_image(middle)).max() <= 1


def test_a_sigmoid_model_keeps_its_bias(tmp_path: Path) -> None:
    info = load(save_model(tmp_path / "s", tiny_model(sigmoid=True))).info
    assert info.probabilities == "sigmoid" and info.logit_bias == pytest.approx(-10)
    assert info.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_tower_that_may_not_be_trimmed_gets_whole_rows(tmp_path: Path) -> None:
    """No causal mask: padding is read, so a cut row would give another vector."""
    text = {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
        "no_causal_mask": True,
    }
    folder = save_model(tmp_path / "t", tiny_model(text_cfg=text))
    runtime, loaded = load(folder), load_model(folder)
    ids = runtime.tokenize("a cat", truncate=False)
    assert (len(ids.ids), ids.count) == (20, 4)
    with torch.inference_mode():
        reference = loaded.model.towers.encode_text(loaded.tokenizer(["a cat"]), normalize=True)
    assert cosines(runtime.encode_texts([ids.ids]), reference).min() >= 0.99999


def test_the_fingerprint_is_the_model_s_and_names_other_arithmetic(
    folder: Path, runtime: TorchRuntime
) -> None:
    half = load(folder, dtype="bfloat16")
    assert runtime.info.fingerprint == load_model(folder).fingerprint
    assert half.info.fingerprint == runtime.info.fingerprint + "-bfloat16"
    assert half.info.gate is not None and 0.99 <= half.info.gate.image < 1
    assert half.info.logit_scale == runtime.info.logit_scale
    assert (
        runtime.info.dtype == "float32"
        and runtime.info.gate is not None
        and runtime.info.gate.image >= 0.9999
    )


def test_auto_takes_the_faster_arithmetic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, dtype in (
        ({"float32": 1.0, "bfloat16": 0.5}, "bfloat16"),
        ({"float32": 1.0, "bfloat16": 0.9}, "float32"),
    ):
        monkeypatch.setattr(
            "serve.loading._time", lambda engines, s=seconds: [s[engine.info.dtype] for engine in engines]
        )
        assert load(folder, dtype="auto").info.dtype == dtype


def test_an_engine_that_damages_vectors_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(folder)
    original = TorchRuntime.encode_images

    def noisy(self: TorchRuntime, images: Any) -> Float32:
        rows = original(self, images)
        return rows + 0.02 * np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)

    monkeypatch.setattr(TorchRuntime, "encode_images", noisy)
    with pytest.raises(SelfTestError, match="centred cosine"):
        build_runtime(loaded, Settings(engine="torch"), device=CPU)


def test_damaged_weights_fail_the_self_test(folder: Path) -> None:
    loaded = load_model(folder)
    inputs = Inputs(loaded, "fast")
    runtime = TorchRuntime(loaded, inputs, device=CPU)
    self_test(runtime)
    broken = copy.deepcopy(loaded)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(SelfTestError):
        self_test(TorchRuntime(broken, inputs, device=CPU))


def test_random_weights_and_pickled_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def random(*args: Any, **options: Any) -> Any:
        return copy.copy(loaded)

    folder = save_model(tmp_path / "m", tiny_model())
    from dataclasses import replace

    loaded = replace(load_model(folder), is_random=True)
    monkeypatch.setattr("serve.loading.load_model", random)
    with pytest.raises(ConfigError, match="--allow-random-weights"):
        load(folder)
    assert load(folder, allow_random_weights=True).info.dimensions == 32
    pickled = tmp_path / "weights.pt"
    pickled.write_bytes(b"whatever")
    with pytest.raises(ConfigError, match="safetensors"):
        load(folder, models=[{"source": "ViT-B-32", "pretrained": str(pickled)}])


def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device = 'abacus'"):
        load(folder, device="abacus")
