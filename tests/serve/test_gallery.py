"""The folder of pictures that the page searches: its mistakes, its limits, its first search."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from clipstack.errors import ConfigError
from serve.gallery import Gallery
from serve.images import ImageLimits
from serve.security import hash_token
from serve.service import Service
from tests.serve.conftest import MakeClient
from tests.serve.fakes import FakeRuntime
from tests.serve.pictures import jpeg


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gallery"
    made.mkdir()
    for number in range(3):
        (made / f"{number}.jpg").write_bytes(jpeg(number))
    return made


def search(client: TestClient, **headers: str) -> Any:
    return client.post("/v1/gallery/search", json={"text": "a cat"}, headers=headers)


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (jpeg(1)[:100], ImageLimits(), "ends early"),
        (b"", ImageLimits(), "no bytes"),
        (jpeg(1), ImageLimits(size_bytes=100), "100"),
    ],
)
def test_a_picture_that_cannot_be_served_is_named(
    folder: Path, data: bytes, limits: ImageLimits, reason: str
) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "broken.jpg").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"gallery.*broken\.jpg.*{reason}.*remove"):
        Gallery.read(folder, max_images=10, limits=limits)


def test_a_folder_of_that_name_is_no_picture(folder: Path) -> None:
    (folder / "x.jpg").mkdir()
    with pytest.raises(ConfigError, match=r"gallery.*x\.jpg"):
        Gallery.read(folder, max_images=10, limits=ImageLimits())


def test_a_first_search_that_failed_is_tried_again(
    make_client: MakeClient, folder: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(gallery=folder)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "encode_images", lambda images: 1 / 0)
        assert search(client).json()["error"]["code"] == "inference_failed"
    assert sorted(hit["name"] for hit in search(client).json()["data"]) == ["0", "1", "2"]


def test_a_search_keeps_its_deadline_while_the_pictures_are_encoded(
    make_client: MakeClient, folder: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(gallery=folder)
    encode = runtime.encode_images

    def held(images: Any) -> Any:
        assert runtime.gate.wait(30)
        return encode(images)

    monkeypatch.setattr(runtime, "encode_images", held)
    runtime.gate.clear()
    monkeypatch.setattr(
        runtime, "encode_texts", lambda texts: [runtime.vector(ids.tobytes()) for ids in texts]
    )
    try:
        late = search(client, **{"x-request-timeout-ms": "200"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    finally:
        runtime.gate.set()
    assert search(client).status_code == 200


def test_each_model_encodes_the_pictures_once_until_it_is_replaced(
    make_client: MakeClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {"a": FakeRuntime("a-1"), "b": FakeRuntime("b-1")}
    monkeypatch.setattr(
        "serve.app.loaders_of", lambda settings, runtime: {name: lambda n=name: engines[n] for name in "ab"}
    )
    client = make_client(
        models=("a=unused", "b=unused"), gallery=folder, admin_token_hashes=(hash_token("root"),)
    )

    def images_of(engine: FakeRuntime) -> int:
        return sum(size for kind, size in engine.batches if kind == "image")

    def search_in_turn() -> None:
        for name in "abab":
            assert client.post("/v1/gallery/search", json={"text": "x", "model": name}).status_code == 200

    before = {name: images_of(engine) for name, engine in engines.items()}
    search_in_turn()
    assert {name: images_of(engine) - before[name] for name, engine in engines.items()} == {"a": 3, "b": 3}

    engines["a"] = FakeRuntime("a-2")
    root = {"authorization": "Bearer root"}
    assert client.post("/v1/models/reload", json={"model": "a"}, headers=root).json()["changed"]
    service: Service = cast(FastAPI, client.app).state.service
    assert service.gallery is not None and set(service.gallery._vectors) == {"b-1"}
    search_in_turn()
    assert images_of(engines["b"]) - before["b"] == 3
