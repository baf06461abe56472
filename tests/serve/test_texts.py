"""Texts that take long to clean, in the square of their length."""

from __future__ import annotations

import threading

import pytest

from serve.runtime import Tokens
from tests.serve.conftest import MakeClient
from tests.serve.fakes import FakeRuntime


def test_at_the_deadline_no_further_text_is_begun(
    make_client: MakeClient, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    answered = threading.Event()
    tokenize = runtime.tokenize

    def slow(text: str, *, truncate: bool) -> Tokens:
        begun.append(text)
        if text == "t2":
            assert answered.wait(30)
        return tokenize(text, truncate=truncate)

    monkeypatch.setattr(runtime, "tokenize", slow)
    client = make_client(decode_threads=1)
    body = {"model": "fake", "input": [f"t{number}" for number in range(100)]}
    reply = client.post("/v1/embeddings", json=body, headers={"x-request-timeout-ms": "100"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    answered.set()
    # The pool's only thread takes this when it is done with the texts above.
    after = client.post("/v1/embeddings", json={"model": "fake", "input": ["next"] * 100})
    assert after.status_code == 200
    assert [text for text in begun if text in body["input"]] == ["t0", "t1", "t2"]
