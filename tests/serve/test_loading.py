"""Which engine a model is served with."""

from __future__ import annotations

import gc
import logging
import math
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from clipstack.checkpoint import load_model
from clipstack.errors import ConfigError
from serve.app import create_app
from serve.gate import passes
from serve.loading import check_engine, load_runtime
from serve.openvino_runtime import OpenVinoRuntime, UnconvertibleError
from serve.runtime import Float32, Gate, Runtime, SelfTestError
from serve.security import hash_token
from serve.settings import ModelSpec, Settings
from serve.torch_runtime import TorchRuntime
from tests.serve.models import TABLES, save_model, tiny_model
from tests.serve.pictures import data_uri, jpeg


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "model", tiny_model())


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="serve")
    return caplog


def load(folder: Path, **values: Any) -> Runtime:
    settings = Settings.model_validate({"models": [str(folder)], **values})
    return load_runtime(settings.models[0], settings)


def pretend(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Times of the engines, by the first word of their name and their dtype."""

    def timed(engines: Sequence[Runtime]) -> list[float]:
        return [seconds[f"{engine.info.engine.split()[0]}_{engine.info.dtype}"] for engine in engines]

    monkeypatch.setattr("serve.loading._time", timed)


@pytest.mark.parametrize(
    ("openvino_s", "torch_s", "engine"),
    [(1.0, 1.5, "openvino"), (1.0, 1.0, "openvino"), (1.5, 1.0, "torch")],
)
def test_auto_takes_openvino_where_it_is_no_slower(
    folder: Path, monkeypatch: pytest.MonkeyPatch, openvino_s: float, torch_s: float, engine: str
) -> None:
    pretend(monkeypatch, openvino_float32=openvino_s, torch_float32=torch_s)
    info = load(folder).info
    assert info.engine.startswith(engine) and info.dtype == "float32"
    assert info.gate is not None and passes(info.gate, "float32")


def test_the_real_clock_chooses_one_of_them(folder: Path, log: pytest.LogCaptureFixture) -> None:
    info = load(folder).info
    (line,) = [record for record in log.records if record.getMessage() == "engines timed"]
    seconds = vars(line)["seconds"]
    assert set(seconds) == {"openvino float32", "torch float32"} and min(seconds.values()) > 0
    assert vars(line)["engine"] == info.engine


@pytest.mark.parametrize(
    ("bfloat16_s", "chosen"), [(0.7, ("torch", "bfloat16")), (0.9, ("openvino", "float32"))]
)
def test_auto_of_both_settings_takes_the_fastest_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bfloat16_s: float, chosen: tuple[str, str]
) -> None:
    pretend(monkeypatch, openvino_float32=1.0, torch_float32=2.0, torch_bfloat16=bfloat16_s)
    info = load(folder, dtype="auto").info
    assert (info.engine.split()[0], info.dtype) == chosen


def test_both_engines_share_the_fingerprint_and_the_vectors(folder: Path) -> None:
    ours, plain = load(folder, engine="openvino"), load(folder, engine="torch")
    assert isinstance(ours, OpenVinoRuntime) and isinstance(plain, TorchRuntime)
    assert ours.info.fingerprint == plain.info.fingerprint
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image, text = ours.prepare_image(pixels), ours.tokenize("a photo of a cat", truncate=False).ids
    assert np.abs(ours.encode_images([image]) - plain.encode_images([image])).max() < 1e-6
    assert np.abs(ours.encode_texts([text]) - plain.encode_texts([text])).max() < 1e-6


def reason(log: pytest.LogCaptureFixture) -> str:
    (line,) = [record for record in log.records if record.getMessage() == "openvino not taken"]
    text: str = vars(line)["reason"]
    return text


def test_without_the_package_auto_takes_torch_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    assert load(folder).info.engine.startswith("torch")
    assert "pip install '.[openvino]' in the checkout" in reason(log)
    with pytest.raises(ConfigError, match=r"engine = 'openvino'.*pip install '\.\[openvino\]'"):
        load(folder, engine="openvino")


def test_a_model_that_cannot_be_converted_goes_to_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(torch.jit, "trace", refuse)
    assert load(folder).info.engine.startswith("torch")
    assert "no such operator" in reason(log)
    with pytest.raises(UnconvertibleError, match=r"engine = 'openvino'.*no such operator.*--engine torch"):
        load(folder, engine="openvino")


def test_vectors_that_fail_the_gate_go_to_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    original = OpenVinoRuntime.encode_texts

    def noisy(self: OpenVinoRuntime, texts: Any) -> Float32:
        rows = original(self, texts)
        return rows + 0.02 * np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)

    monkeypatch.setattr(OpenVinoRuntime, "encode_texts", noisy)
    assert load(folder).info.engine.startswith("torch")
    assert "gate" in reason(log)
    with pytest.raises(SelfTestError, match="gate"):
        load(folder, engine="openvino")


@pytest.mark.parametrize("gate", [Gate(1.0, math.nan), Gate(math.nan, 1.0), Gate(0.5, 1.0), Gate(1.0, 0.5)])
def test_the_gate_lets_nothing_but_close_vectors_through(gate: Gate) -> None:
    assert not passes(gate, "float32") and passes(Gate(1.0, 1.0), "float32")


@pytest.mark.parametrize(
    "spoilt", [lambda rows: rows + np.float32(1e-4), lambda rows: rows * np.float32(math.nan)]
)
def test_vectors_that_are_not_torch_s_for_long_texts_alone_go_to_torch(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    spoilt: Callable[[Float32], Float32],
) -> None:
    original = OpenVinoRuntime.encode_texts

    def wrong_for_one(self: OpenVinoRuntime, texts: Any) -> Float32:
        rows = original(self, texts)
        return spoilt(rows) if len(texts) == 1 and len(texts[0]) > 15 else rows

    monkeypatch.setattr(OpenVinoRuntime, "encode_texts", wrong_for_one)
    assert load(folder).info.engine.startswith("torch")
    assert "differ" in reason(log)


def test_a_package_that_is_broken_is_told_from_one_that_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr("serve.openvino_runtime.importlib.import_module", broken)
    with pytest.raises(ConfigError, match=r"cannot be imported \(libtbb.*force-reinstall"):
        check_engine(Settings(engine="openvino"), torch.device("cpu"))


def test_a_graph_that_only_takes_some_batches_goes_to_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def broken(self: OpenVinoRuntime, images: Any) -> Float32:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(OpenVinoRuntime, "encode_images", broken)
    assert load(folder).info.engine.startswith("torch")
    assert "shapes do not fit" in reason(log)


@pytest.mark.parametrize("context_length", [3, 8, 12, 24, 41])
def test_openvino_takes_text_towers_of_any_context(tmp_path: Path, context_length: int) -> None:
    tables = TABLES["text_cfg"] | {"context_length": context_length}
    model = tiny_model(text_cfg=tables)
    engine = load(save_model(tmp_path / "model", model), engine="openvino")
    ids = engine.tokenize("a photo of a cat " * 20, truncate=True).ids
    assert len(ids) == context_length
    with torch.inference_mode():
        expected = model.towers.encode_text(torch.from_numpy(ids)[None], normalize=True).numpy()
    assert np.abs(engine.encode_texts([ids]) - expected).max() < 1e-5


def test_what_openvino_cannot_do_is_refused_with_the_fix(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine = 'openvino'.*bfloat16.*--engine torch"):
        load(folder, engine="openvino", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"engine = 'openvino'.*device is cuda:0.*--device cpu"):
        check_engine(Settings(engine="openvino"), torch.device("cuda:0"))
    assert load(folder, dtype="bfloat16").info.engine.startswith("torch")


def test_reload_and_roll_back_with_openvino(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tiny_model())
    settings = Settings(
        models=(ModelSpec(id="m", source=str(folder)),),
        engine="openvino",
        label_set_file=tmp_path / "sets.sqlite3",
        admin_token_hashes=(hash_token("root"),),
    )
    with TestClient(create_app(settings), headers={"authorization": "Bearer root"}) as client:

        def vector() -> Float32:
            reply = client.post("/v1/embeddings", json={"model": "m", "input": "a photo of a cat"})
            return np.float32(reply.json()["data"][0]["embedding"])

        def expected(seed: int) -> Float32:
            loaded = load_model(save_model(tmp_path / str(seed), tiny_model(seed)))
            with torch.inference_mode():
                tokens = loaded.tokenizer(["a photo of a cat"])
                row: Float32 = loaded.model.towers.encode_text(tokens, normalize=True).numpy()[0]
            return row

        assert np.abs(vector() - expected(0)).max() < 1e-5
        save_model(folder, tiny_model(1))
        assert client.post("/v1/models/reload", json={}).json()["changed"]
        assert np.abs(vector() - expected(1)).max() < 1e-5
        damaged = tiny_model(2)
        next(damaged.parameters()).fill_(float("nan"))
        save_model(folder, damaged)
        refused = client.post("/v1/models/reload", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
        assert np.abs(vector() - expected(1)).max() < 1e-5
        assert client.get("/readyz").status_code == 200
        (model,) = client.get("/v1/models").json()["data"]
        assert model["engine"].startswith("openvino ") and model["dtype"] == "float32"
        gauge = f'model_info{{engine="{model["engine"]}",fingerprint="{model["fingerprint"]}",model="m"}} 1.0'
        assert gauge in client.get("/metrics").text


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_reload_lets_go_of_the_model_that_goes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Not when Python's rarest collection comes by: weights of gigabytes would stand twice until then."""
    seen: list[weakref.ref[Any]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        loaded = load_model(*arguments, **options)
        seen.extend(map(weakref.ref, (loaded, loaded.model, loaded.tokenizer)))
        return loaded

    monkeypatch.setattr("serve.loading.load_model", watched)
    folder = save_model(tmp_path / "model", tiny_model())
    settings = Settings(
        models=(ModelSpec(id="m", source=str(folder)),),
        engine=engine,
        label_set_file=tmp_path / "sets.sqlite3",
        admin_token_hashes=(hash_token("root"),),
    )
    body = {"model": "m", "input": ["a photo of a cat", {"image": data_uri(jpeg())}]}
    damaged, serving = tiny_model(9), 0
    next(damaged.parameters()).fill_(float("nan"))
    # A refused model goes, and so does the version that served meanwhile when its own turn has come.
    steps = (tiny_model(1), damaged, tiny_model(2), None, tiny_model(3))
    gc.disable()
    try:
        with TestClient(create_app(settings), headers={"authorization": "Bearer root"}) as client:
            assert client.post("/v1/embeddings", json=body).status_code == 200
            for model in steps:
                if model is None:
                    shutil.rmtree(folder)
                else:
                    save_model(folder, model)
                is_good = model is not None and model is not damaged
                reply = client.post("/v1/models/reload", json={})
                assert reply.status_code == (200 if is_good else 409)
                serving = len(seen) // 3 - 1 if is_good else serving
                assert client.post("/v1/embeddings", json=body).status_code == 200
                assert {index // 3 for index, part in enumerate(seen) if part() is not None} <= {serving}
            assert len(seen) == 3 * 5  # the folder without a model gave none
    finally:
        gc.enable()
