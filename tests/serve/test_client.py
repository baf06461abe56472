"""The thin client, blocking and async, against the app and against scripted replies."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from serve.app import create_app
from serve.client import ApiError, AsyncClient, Client
from serve.security import hash_token
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server
from tests.serve.pictures import jpeg


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(
        models=("fake=unused",),  # type: ignore[arg-type]
        label_set_file=tmp_path_factory.mktemp("state") / "sets.sqlite3",
        token_hashes=(hash_token("sk-client"),),
    )
    with live_server(create_app(settings, FakeRuntime())) as base:
        yield base


def test_both_clients_do_the_same(url: str, tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(jpeg(1))
    engine = FakeRuntime()

    async def all_async() -> tuple[object, ...]:
        async with AsyncClient(url, token="sk-client") as client:
            await client.put_label_set("pets", ["cat", "dog"], templates=["my {}"])
            return (
                await client.models(),
                await client.embed(["a cat", image, jpeg(2)]),
                await client.classify([image], labels=["cat", "dog"], top_k=1),
                await client.classify(["x"], label_set="pets", abstain_below=0.99),
                await client.similarity(["a", "b"], [image, jpeg(2)]),
                await client.label_sets(),
                await client.delete_label_set("pets"),
            )

    with Client(url, token="sk-client", model="fake") as client:
        client.put_label_set("pets", ["cat", "dog"], templates=["my {}"])
        blocking = (
            client.models(),
            client.embed(["a cat", image, jpeg(2)]),
            client.classify([image], labels=["cat", "dog"], top_k=1),
            client.classify(["x"], label_set="pets", abstain_below=0.99),
            client.similarity(["a", "b"], [image, jpeg(2)]),
            client.label_sets(),
            client.delete_label_set("pets"),
        )
    assert asyncio.run(all_async()) == blocking
    models, embedded, classified, abstained, similarity, label_sets, _ = blocking
    np.testing.assert_array_equal(np.float32(embedded.vectors[0]), engine.text_vector("a cat"))
    assert models[0].dimensions == 16 and label_sets == {"pets": ["cat", "dog"]}
    assert classified[0].best.label in ("cat", "dog") and len(classified[0].predictions) == 1
    assert abstained[0].abstained and len(similarity) == len(similarity[0]) == 2


def test_errors_carry_code_param_and_request_id(url: str) -> None:
    with Client(url, token="sk-client", model="fake") as client, pytest.raises(ApiError) as caught:
        client.embed(["fine", ""])
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "text_empty", "input[1]")
    assert caught.value.request_id and caught.value.request_id in str(caught.value)
    with Client(url, token="sk-client", if_fingerprint="other") as client, pytest.raises(ApiError) as caught:
        client.classify(["a"], labels=["b"])
    assert caught.value.code == "fingerprint_mismatch"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "unauthorized"}, "unauthorized"),
        ("bad gateway", "bad gateway"),
        ({"error": None}, "Bad Gateway"),
        ({"error": {"code": None}}, "Bad Gateway"),
        ([], "Bad Gateway"),
    ],
)
def test_an_error_in_the_shape_of_another_program_is_an_api_error(body: object, message: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(502, json=body))
    with Client("http://test", transport=transport) as client, pytest.raises(ApiError) as caught:
        client.models()
    assert (caught.value.status, caught.value.code, caught.value.message) == (502, "unknown", message)


def busy_then_ok(times: int, *, after_ms: str) -> httpx.MockTransport:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(int(request.headers["x-request-timeout-ms"]))
        if len(seen) <= times:
            body = {"error": {"code": "queue_full", "message": "full", "param": None}, "request_id": "r"}
            return httpx.Response(429, json=body, headers={"retry-after-ms": after_ms})
        assert seen == sorted(seen, reverse=True)
        return httpx.Response(200, json={"data": []})

    return httpx.MockTransport(answer)


def test_a_busy_server_is_asked_again_when_it_says_so() -> None:
    with Client("http://test", transport=busy_then_ok(2, after_ms="1")) as client:
        assert client.models() == []

    async def again() -> None:
        async with AsyncClient("http://test", transport=busy_then_ok(2, after_ms="1")) as client:
            assert await client.models() == []

    asyncio.run(again())


def test_waiting_ends_with_the_deadline() -> None:
    with (
        Client("http://test", transport=busy_then_ok(1, after_ms="60000"), timeout_s=1) as client,
        pytest.raises(ApiError) as caught,
    ):
        client.models()
    assert caught.value.code == "queue_full"


def loading_then_ready(*, after_ms: str, lists_one: bool = True) -> httpx.MockTransport:
    """A server that lists no model until /readyz has said once that it is loading."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        match request.url.path:
            case "/readyz" if asked.count("/readyz") == 1:
                body = {"error": {"code": "loading", "message": "loading", "param": None}, "request_id": "r"}
                return httpx.Response(503, json=body, headers={"retry-after-ms": after_ms})
            case "/readyz":
                return httpx.Response(200, json={"status": "ready"})
            case "/v1/models":
                model = {"id": "m", "fingerprint": "f", "dimensions": 1, "context_length": 1}
                models = [{**model, "image_size": [1, 1]}] if lists_one and "/readyz" in asked else []
                return httpx.Response(200, json={"data": models})
            case _:
                assert json.loads(request.content)["model"] == "m"
                reply = {"data": [], "model": "m", "fingerprint": "f", "truncated": []}
                return httpx.Response(200, json=reply)

    return httpx.MockTransport(answer)


def embed_with_both(make: Callable[[], httpx.MockTransport]) -> Iterator[Callable[[], str]]:
    """The model that each client asked, when called."""

    def blocking() -> str:
        with Client("http://test", transport=make(), timeout_s=1) as client:
            return client.embed([]).model

    async def waiting() -> str:
        async with AsyncClient("http://test", transport=make(), timeout_s=1) as client:
            return (await client.embed([])).model

    yield blocking
    yield lambda: asyncio.run(waiting())


def test_embed_waits_for_a_server_that_is_loading() -> None:
    for embed in embed_with_both(lambda: loading_then_ready(after_ms="1")):
        assert embed() == "m"


@pytest.mark.parametrize(
    ("after_ms", "lists_one", "code"), [("60000", True, "loading"), ("1", False, "no_models")]
)
def test_embed_without_a_model_is_an_error_with_a_code(after_ms: str, lists_one: bool, code: str) -> None:
    for embed in embed_with_both(lambda: loading_then_ready(after_ms=after_ms, lists_one=lists_one)):
        with pytest.raises(ApiError) as caught:
            embed()
        assert caught.value.code == code


def test_the_client_needs_httpx_alone() -> None:
    heavy = ("torch", "numpy", "pydantic", "fastapi", "PIL")
    code = f"import sys, serve.client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
