"""The OpenVINO engine against open_clip's own forward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipstack.checkpoint import LoadedModel, load_model
from serve.inputs import Inputs
from serve.openvino_runtime import OpenVinoRuntime, UnconvertibleError
from serve.runtime import Float32, TokenIds, UInt8
from serve.versions import self_test
from tests.serve.models import save_model, tiny_model
from tests.serve.pictures import picture

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ("red", "green", "blue", "small", "large", "round", "square", "old", "new", "bright", "dark", "quiet")
LENGTHS = (3, 60, 77, 8, 9, 5, 30, 16)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_model(tmp_path_factory.mktemp("tiny") / "model", tiny_model()))


@pytest.fixture(scope="module")
def runtime(loaded: LoadedModel) -> OpenVinoRuntime:
    return OpenVinoRuntime(loaded, Inputs(loaded, "fast"), threads=2, lanes=2)


def text_of(num_tokens: int) -> str:
    """A text that has `num_tokens` tokens, start and end included."""
    return " ".join(WORDS[n % len(WORDS)] for n in range(num_tokens - 2))


def images_of(runtime: OpenVinoRuntime, count: int) -> list[UInt8]:
    return [runtime.prepare_image(np.asarray(picture(n))) for n in range(count)]


def texts_of(runtime: OpenVinoRuntime, lengths: tuple[int, ...] = LENGTHS) -> list[TokenIds]:
    return [runtime.tokenize(text_of(length), truncate=False).ids for length in lengths]


def plain_images(loaded: LoadedModel, images: list[UInt8]) -> Float32:
    """open_clip's own encode_image of prepared images."""
    with torch.inference_mode():
        pixels = loaded.preprocess.normalize(torch.from_numpy(np.stack(images)))
        rows: Float32 = loaded.model.towers.encode_image(pixels, normalize=True).numpy()
    return rows


def plain_texts(loaded: LoadedModel, texts: list[str]) -> Float32:
    """open_clip's own encode_text, of whole rows."""
    with torch.inference_mode():
        rows: Float32 = loaded.model.towers.encode_text(loaded.tokenizer(texts), normalize=True).numpy()
    return rows


def assert_equal(ours: Float32, theirs: Float32) -> None:
    assert (ours * theirs).sum(axis=-1).min() >= 0.99999
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("size", [1, 3, 8])
def test_image_vectors_are_those_of_open_clip(
    loaded: LoadedModel, runtime: OpenVinoRuntime, size: int
) -> None:
    images = images_of(runtime, size)
    assert_equal(runtime.encode_images(images), plain_images(loaded, images))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_text_vectors_are_those_of_open_clip_at_every_length(
    loaded: LoadedModel, runtime: OpenVinoRuntime, size: int
) -> None:
    reference = plain_texts(loaded, [text_of(length) for length in LENGTHS[:size]])
    assert_equal(runtime.encode_texts(texts_of(runtime, LENGTHS[:size])), reference)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 7), min_size=1, max_size=8))
def test_a_vector_is_the_same_in_any_company(runtime: OpenVinoRuntime, order: list[int]) -> None:
    images, texts = images_of(runtime, 8), texts_of(runtime)
    for encode, items in ((runtime.encode_images, images), (runtime.encode_texts, texts)):
        encode_any: Callable[[Any], Float32] = encode
        alone = np.concatenate([encode_any([items[n]]) for n in order])
        assert np.abs(encode_any([items[n] for n in order]) - alone).max() < 1e-5


def test_threads_that_compute_at_once_do_not_mix(runtime: OpenVinoRuntime) -> None:
    images, texts = images_of(runtime, 8), texts_of(runtime)
    expected = {n: (runtime.encode_images([images[n]]), runtime.encode_texts([texts[n]])) for n in range(8)}

    def work(n: int) -> bool:
        image, text = runtime.encode_images([images[n]]), runtime.encode_texts([texts[n]])
        return bool(max(np.abs(image - expected[n][0]).max(), np.abs(text - expected[n][1]).max()) < 1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, list(range(8)) * 16))


def test_what_raised_is_not_used_again(runtime: OpenVinoRuntime) -> None:
    (image,) = images_of(runtime, 1)
    expected = runtime.encode_images([image])
    with pytest.raises(RuntimeError):
        runtime.encode_images([image[:, :5]])
    assert_equal(runtime.encode_images([image]), expected)


def test_rows_that_were_given_out_stay_as_they_are(runtime: OpenVinoRuntime) -> None:
    first, second = images_of(runtime, 2)
    rows = runtime.encode_images([first])
    before = rows.copy()
    runtime.encode_images([second])
    np.testing.assert_array_equal(rows, before)


TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"sigmoid": True},
    "a text tower that may not be trimmed": {
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 49408,
            "width": 64,
            "heads": 4,
            "layers": 2,
            "no_causal_mask": True,
        }
    },
    "a picture that is not square": {
        "vision_cfg": {"image_size": [32, 48], "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    },
    "a ResNet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}},
    "quick GELU": {"quick_gelu": True},
}


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS.keys())
def test_towers_of_other_kinds(tmp_path: Path, changes: dict[str, Any]) -> None:
    other = load_model(save_model(tmp_path / "m", tiny_model(**changes)))
    engine = OpenVinoRuntime(other, Inputs(other, "fast"), threads=1, lanes=2)
    images, texts = images_of(engine, 3), ["a cat", "two dogs and a bird", text_of(18)]
    assert_equal(engine.encode_images(images), plain_images(other, images))
    ids = [engine.tokenize(text, truncate=False).ids for text in texts]
    assert_equal(engine.encode_texts(ids), plain_texts(other, texts))
    self_test(engine)
    assert engine.info.probabilities == ("sigmoid" if "sigmoid" in changes else "softmax")


def test_a_tower_that_cannot_be_taken_over_is_named_with_the_fix(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looped(images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(images.float()).real.flatten(1)

    monkeypatch.setattr(loaded.model, "encode_image", looped)
    with pytest.raises(UnconvertibleError, match=r"engine = 'openvino'.*eig.*--engine torch"):
        OpenVinoRuntime(loaded, Inputs(loaded, "fast"))


LOADED_AGAIN = """
import gc, sys
gc.disable()
from clipstack.checkpoint import load_model
from serve.inputs import Inputs
from serve.openvino_runtime import OpenVinoRuntime
def load():
    loaded = load_model(sys.argv[1])
    OpenVinoRuntime(loaded, Inputs(loaded, "fast"), threads=2, lanes=2)
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4 / 1024
for _ in range(12):
    load()
before = resident_mb()
for _ in range(12):
    load()
print(resident_mb() - before)
"""


@pytest.mark.slow
def test_loading_again_and_again_keeps_memory_flat(tmp_path: Path) -> None:
    """Types that tracing leaves behind would be 46 MB here, cycles that wait to be collected 250 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED_AGAIN, str(save_model(tmp_path / "model", tiny_model()))],
        cwd=REPOSITORY, env={**os.environ, **QUIET}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 25


QUIET = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
WATCHED = """
import sys
seen = []
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "os.mkdir") or writes:
        seen.append((event, str(arguments[:2])))
sys.addaudithook(watch)
import numpy as np
import serve.loading
assert "openvino" not in sys.modules
from clipstack.checkpoint import load_model
from serve.settings import Settings
settings = Settings(models=(sys.argv[1],), engine="openvino")
seen.clear()
runtime = serve.loading.load_runtime(settings.models[0], settings)
runtime.encode_images([runtime.prepare_image(np.zeros((40, 40, 3), np.uint8))])
runtime.encode_texts([runtime.tokenize("a cat", truncate=False).ids])
assert "openvino" in sys.modules and sys.modules["openvino_telemetry"] is None
print(seen)
"""


def test_it_calls_nobody_and_writes_nothing(tmp_path: Path) -> None:
    """What OpenVINO does by itself: an id in the home folder, and an event to its makers at every import."""
    folder = save_model(tmp_path / "model", tiny_model())
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "HOME": str(home), "CI": "", **QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr
    assert list(home.rglob("*")) == []
