"""OpenAI's own clients, unchanged, and curl, against a real server on a real port."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from serve.app import create_app
from serve.security import hash_token
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server
from tests.serve.pictures import data_uri, jpeg

TEXTS = ["a cat", "a dog", "a green fish"]


@pytest.fixture(scope="module")
def engine() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture(scope="module")
def url(engine: FakeRuntime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(
        models=("fake=unused",),  # type: ignore[arg-type]
        label_set_file=tmp_path_factory.mktemp("state") / "sets.sqlite3",
        token_hashes=(hash_token("sk-test"),),
    )
    with live_server(create_app(settings, engine)) as base:
        yield base + "/v1"


@pytest.fixture(scope="module")
def expected(engine: FakeRuntime) -> Any:
    return np.stack([engine.text_vector(text) for text in TEXTS])


def rows(reply: Any) -> Any:
    assert (reply.object, reply.model) == ("list", "fake")
    assert [entry.index for entry in reply.data] == [0, 1, 2]
    return np.array([entry.embedding for entry in reply.data], dtype=np.float32)


def test_the_python_client(url: str, expected: Any) -> None:
    with openai.OpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
        reply = client.embeddings.create(model="fake", input=TEXTS)  # asks for base64 by itself
        np.testing.assert_array_equal(rows(reply), expected)
        assert reply.usage.prompt_tokens == 13
        floats = client.embeddings.create(model="fake", input=TEXTS, encoding_format="float", user="me")
        np.testing.assert_array_equal(rows(floats), expected)
        short = client.embeddings.create(model="fake", input=TEXTS, dimensions=8)
        assert rows(short).shape == (3, 8)
        one = client.embeddings.create(model="fake", input="a cat")
        np.testing.assert_array_equal(np.float32(one.data[0].embedding), expected[0])
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").owned_by == "clipstack"


def test_the_python_client_sends_images_as_further_fields(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
        images = [data_uri(jpeg(n)) for n in range(3)]
        reply = client.embeddings.create(model="fake", input=images, extra_body={"modality": "image"})
        assert rows(reply).shape == (3, 16)


def test_the_python_client_understands_errors(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="gpt-9", input="a")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        assert missing.value.request_id is not None
        with pytest.raises(openai.BadRequestError) as long:
            client.embeddings.create(model="fake", input=["a", "word " * 60])
        assert (long.value.code, long.value.param) == ("text_too_long", "input[1]")
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_the_async_python_client(url: str, expected: Any) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            replies = await asyncio.gather(
                client.embeddings.create(model="fake", input=TEXTS),
                client.embeddings.create(model="fake", input=TEXTS, encoding_format="float"),
            )
        for reply in replies:
            np.testing.assert_array_equal(rows(reply), expected)

    asyncio.run(scenario())


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2], apiKey: "sk-test", maxRetries: 0});
const texts = JSON.parse(process.argv[3]);
const replies = [];
for (const extra of [{}, {encoding_format: "float"}, {encoding_format: "base64"}]) {
  const reply = await client.embeddings.create({model: "fake", input: texts, ...extra});
  replies.push(reply.data.map((entry) => entry.embedding));
}
let code;
try { await client.embeddings.create({model: "nope", input: "a"}); } catch (error) { code = [error.status,
error.code]; } const models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify({replies, code, models}));
"""


@pytest.fixture(scope="session")
def openai_for_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where node finds the `openai` package, fetched by npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed; the JavaScript client is not tested")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"npm cannot fetch the openai package: {done.stderr.strip()[-200:]}")
    return folder


def test_the_javascript_client(url: str, expected: Any, openai_for_node: Path) -> None:
    (openai_for_node / "check.mjs").write_text(SCRIPT)
    done = subprocess.run(
        ["node", "check.mjs", url, json.dumps(TEXTS)],
        cwd=openai_for_node, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["code"] == [404, "model_not_found"] and got["models"] == ["fake"]
    default, floats, raw = got["replies"]
    np.testing.assert_array_equal(np.float32(default), expected)
    np.testing.assert_array_equal(np.float32(floats), expected)
    assert all(isinstance(entry, str) for entry in raw)


def test_curl(url: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    command = ["curl", "-sS", "-H", "Authorization: Bearer sk-test", f"{url}/classify"]
    command += ["-F", f"inputs=@{tmp_path}/a.jpg", "-F", "labels=cat", "-F", "labels=dog"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    assert {entry["label"] for entry in json.loads(done.stdout)["data"][0]["predictions"]} == {"cat", "dog"}
