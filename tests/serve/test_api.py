"""The contract over HTTP, in process and with a fake runtime."""

from __future__ import annotations

import base64
import json
import logging
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve.logs import configure_logging
from serve.operations import judge
from serve.schemas import EmbeddingsRequest
from serve.security import hash_token
from serve.zero_shot import prompts_of
from tests.serve.conftest import MakeClient
from tests.serve.fakes import FakeRuntime, unit
from tests.serve.live import wait_until
from tests.serve.pictures import data_uri, encoded, jpeg, picture

IMAGE = {"image": data_uri(jpeg(1))}
MOVING = data_uri(encoded(picture(), "WEBP", save_all=True, append_images=[picture(2)]))


def embed(client: TestClient, value: Any, **fields: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": "fake", "input": value, **fields})


def vectors(response: Any) -> Any:
    assert response.status_code == 200, response.text
    assert [entry["index"] for entry in response.json()["data"]] == list(range(len(response.json()["data"])))
    return np.array([entry["embedding"] for entry in response.json()["data"]], dtype=np.float32)


def refused(response: Any, status: int, code: str, param: str | None = None) -> Any:
    body = response.json()
    assert (response.status_code, body["error"]["code"]) == (status, code), response.text
    assert set(body) == {"error", "request_id"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert body["request_id"] == response.headers["x-request-id"]
    return body["error"]


# Embeddings


def test_embeddings_mix_texts_and_images_in_order(client: TestClient, runtime: FakeRuntime) -> None:
    mixed = embed(
        client,
        ["a cat", IMAGE, {"text": "a dog"}, {"image": data_uri(jpeg(2))}, {"image_url": IMAGE["image"]}],
    )
    rows = vectors(mixed)
    np.testing.assert_array_equal(rows[0], runtime.text_vector("a cat"))
    np.testing.assert_array_equal(rows[2], runtime.text_vector("a dog"))
    np.testing.assert_array_equal(rows[1], vectors(embed(client, [IMAGE]))[0])
    np.testing.assert_array_equal(rows[4], rows[1])
    assert not np.array_equal(rows[3], rows[1])
    body = mixed.json()
    assert (body["object"], body["model"], body["fingerprint"]) == ("list", "fake", "fake-1")
    assert body["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert np.allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-6)


def test_a_lone_text_and_openai_fields_are_taken(client: TestClient, runtime: FakeRuntime) -> None:
    np.testing.assert_array_equal(
        vectors(embed(client, "a cat", user="someone"))[0], runtime.text_vector("a cat")
    )


def test_plain_strings_are_images_where_the_modality_says_so(client: TestClient) -> None:
    rows = vectors(embed(client, [IMAGE["image"], base64.b64encode(jpeg(1)).decode()], modality="image"))
    np.testing.assert_array_equal(rows, vectors(embed(client, [IMAGE, IMAGE])))


def test_base64_is_little_endian_float32(client: TestClient) -> None:
    reply = embed(client, ["a cat", IMAGE], encoding_format="base64").json()
    rows = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in reply["data"]]
    np.testing.assert_array_equal(np.stack(rows), vectors(embed(client, ["a cat", IMAGE])))


@pytest.mark.parametrize(
    ("accept", "dtype"),
    [("application/octet-stream", "<f4"), ("application/octet-stream; dtype=float16", "<f2")],
)
def test_raw_vectors_with_their_shape_in_headers(client: TestClient, accept: str, dtype: str) -> None:
    request = {"model": "fake", "input": ["a cat", "a dog", IMAGE]}
    reply = client.post("/v1/embeddings", json=request, headers={"accept": accept})
    shape = tuple(int(size) for size in reply.headers["x-embedding-shape"].split(","))
    assert np.dtype(reply.headers["x-embedding-dtype"]) == np.dtype(dtype)
    rows = np.frombuffer(reply.content, dtype).reshape(shape)
    np.testing.assert_allclose(
        rows, vectors(embed(client, request["input"])), atol=1e-3 if dtype == "<f2" else 0
    )


def test_uploads_need_no_base64(client: TestClient) -> None:
    files = [
        ("input", ("a.jpg", jpeg(1))),
        ("input", ("b.png", encoded(picture(2), "PNG"))),
        ("input", (None, "a cat")),
    ]
    reply = client.post("/v1/embeddings", data={"model": "fake"}, files=files)
    expected = [IMAGE, {"image": data_uri(encoded(picture(2), "PNG"))}, "a cat"]
    np.testing.assert_array_equal(vectors(reply), vectors(embed(client, expected)))


@pytest.mark.parametrize("missing", [1, 9, 40])
def test_an_upload_that_was_cut_is_refused_and_no_part_is_dropped_in_silence(
    client: TestClient, missing: int
) -> None:
    part = b'--XX\r\nContent-Disposition: form-data; name="input"\r\n\r\na cat\r\n'
    model = b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\nfake\r\n'
    whole = model + part + part + b"--XX--"
    headers = {"content-type": "multipart/form-data; boundary=XX"}
    assert vectors(client.post("/v1/embeddings", content=whole, headers=headers)).shape[0] == 2
    cut = client.post("/v1/embeddings", content=whole[:-missing], headers=headers)
    refused(cut, 400, "invalid_request")


def test_dimensions_are_refused_unless_trained_for_and_then_renormalised(client: TestClient) -> None:
    whole, half = vectors(embed(client, ["a cat"])), vectors(embed(client, ["a cat"], dimensions=8))
    np.testing.assert_allclose(half[0], whole[0][:8] / np.linalg.norm(whole[0][:8]), rtol=1e-6)
    assert vectors(embed(client, ["a cat"], dimensions=16)).shape == (1, 16)
    refused(embed(client, ["a cat"], dimensions=5), 400, "dimensions_unsupported", "dimensions")


def test_long_texts_are_refused_unless_they_may_be_cut(client: TestClient, runtime: FakeRuntime) -> None:
    long = "word " * 50
    refused(embed(client, ["short", long]), 400, "text_too_long", "input[1]")
    reply = embed(client, ["short", long, IMAGE], truncate=True)
    np.testing.assert_array_equal(vectors(reply)[1], runtime.text_vector(long))
    assert reply.json()["truncated"] == [1]
    refused(embed(client, "x" * 9000), 400, "text_too_long", "input[0]")
    assert embed(client, "x" * 9000, truncate=True).json()["truncated"] == [0]


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_refused_with_the_setting_that_helps(client: TestClient, tokens: Any) -> None:
    reply = embed(client, tokens)
    assert "check_embedding_ctx_length=False" in reply.json()["error"]["message"]
    refused(reply, 400, "token_ids_unsupported", "input" if isinstance(tokens[0], int) else "input[0]")


# Errors


def test_wrong_requests_name_the_part_that_is_wrong(client: TestClient) -> None:
    refused(
        client.post("/v1/embeddings", json={"model": "nope", "input": "a"}), 404, "model_not_found", "model"
    )
    refused(client.post("/v1/embeddings", json={"input": "a"}), 400, "invalid_request", "model")
    refused(client.post("/v1/embeddings", json={"model": "fake"}), 400, "invalid_request", "input")
    refused(client.post("/v1/embeddings", json=[1]), 400, "invalid_request")
    refused(client.post("/v1/embeddings", content=b"{"), 400, "invalid_json")
    refused(
        client.post("/v1/embeddings", content=b'{"model": "fake", "input": "\\ud800"}'), 400, "invalid_json"
    )
    refused(client.post("/v1/embeddings", content=b"[" * 100_000), 400, "invalid_json")
    refused(
        client.post("/v1/embeddings", content=b"a", headers={"content-type": "text/csv"}),
        415,
        "unsupported_media_type",
    )
    gzipped = client.post("/v1/embeddings", content=b"a", headers={"content-encoding": "gzip"})
    refused(gzipped, 415, "unsupported_media_type")
    refused(embed(client, []), 400, "invalid_request", "input")
    refused(embed(client, ["a", ""]), 400, "text_empty", "input[1]")
    refused(embed(client, ["a", {"text": "b", "image": "c"}]), 400, "invalid_request", "input[1]")
    refused(embed(client, ["a", None]), 400, "invalid_request", "input[1]")
    refused(embed(client, "a", encoding_format="int8"), 400, "invalid_request", "encoding_format")
    refused(embed(client, "a", truncate="yes"), 400, "invalid_request", "truncate")
    refused(embed(client, "a", colour="red"), 400, "invalid_request", "colour")
    name = "n" * 10_000
    refused(embed(client, "a", **{name: 1}), 400, "invalid_request", name[:200])
    refused(client.get("/v1/nothing"), 404, "not_found")
    wrong_method = client.put("/v1/classify")
    refused(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize("unit", [b"[],", b'"a",', b"1,"], ids=["lists", "texts", "numbers"])
def test_what_a_json_body_holds_is_bounded_before_it_is_parsed(
    client: TestClient, unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.bodies.jiter.from_json", None)
    many = b'{"model": "fake", "input": [' + unit * 300_000 + b"1]}"
    refused(client.post("/v1/embeddings", content=many), 413, "too_many_items")
    names = b",".join(b'"%x": 1' % number for number in range(150_000))
    refused(client.post("/v1/embeddings", content=b'{"input": {' + names + b"}}"), 413, "too_many_items")


def test_a_text_may_hold_any_number_of_marks_within_reason(client: TestClient) -> None:
    long = "[{:,}] " * 20_000
    assert embed(client, long, truncate=True).json()["truncated"] == [0]


def test_the_first_of_many_unknown_names_is_named_and_no_other_looked_at(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pydantic makes an error for every one of them, which took seconds and a gigabyte."""
    monkeypatch.setattr(EmbeddingsRequest, "model_validate", None)
    many = {f"name{number}": 1 for number in range(50_000)}
    refused(client.post("/v1/embeddings", json=many), 400, "invalid_request", "name0")
    form = "".join(f'--XX\r\nContent-Disposition: form-data; name="n{n}"\r\n\r\n1\r\n' for n in range(99))
    headers = {"content-type": "multipart/form-data; boundary=XX"}
    reply = client.post("/v1/embeddings", content=form + "--XX--\r\n", headers=headers)
    refused(reply, 400, "invalid_request", "n0")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "fake", "input": "a", "input": "b"}',
        b'{"model": "fake", "input": {"text": "a", "text": "b"}}',
        b'{"model": "fake", "input": "a", "user": "x", "us\\u0065r": "y"}',
    ],
)
def test_a_name_given_twice_is_refused_since_readers_differ_on_which_counts(
    client: TestClient, body: bytes
) -> None:
    error = refused(client.post("/v1/embeddings", content=body), 400, "invalid_json")
    assert "duplicate" in error["message"]


def test_an_upload_s_field_given_twice_is_refused_where_it_takes_one_value(client: TestClient) -> None:
    files = {"inputs": ("a.jpg", jpeg(1))}
    question = {"labels": ["cat", "dog"], "top_k": ["1", "2"]}
    refused(client.post("/v1/classify", data=question, files=files), 400, "invalid_request", "top_k")
    question["top_k"] = ["1"]
    assert client.post("/v1/classify", data=question, files=files).status_code == 200


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-16", "latin-1", "undefined", "nonsense"])
def test_an_upload_is_utf_8_whatever_codec_it_names(
    client: TestClient, runtime: FakeRuntime, charset: str
) -> None:
    """Python knows codecs whose time is quadratic: 0.4 MB in one of them holds up everybody for seconds."""
    part = '--XX\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    body = part.format("model", "fake") + part.format("input", "ein grüner fisch") + "--XX--\r\n"
    headers = {"content-type": f"multipart/form-data; boundary=XX; charset={charset}"}
    reply = client.post("/v1/embeddings", content=body.encode(), headers=headers)
    np.testing.assert_array_equal(vectors(reply)[0], runtime.text_vector("ein grüner fisch"))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_slash_too_many_is_no_such_path_and_no_redirect(client: TestClient, method: str) -> None:
    for path in ("/livez/", "/v1/embeddings/", "/v1/label-sets/", "/v1/classify/"):
        reply = client.request(method, path, json={"model": "fake", "input": "a"}, follow_redirects=False)
        refused(reply, 404, "not_found")


def test_head_answers_as_get_does_without_the_body(client: TestClient) -> None:
    client.put("/v1/label-sets/pets", json={"labels": ["cat"]}).raise_for_status()
    for path in (
        "/livez", "/readyz", "/metrics", "/v1/models", "/v1/models/fake", "/v1/label-sets",
        "/v1/label-sets/pets", "/", "/docs", "/static/page.css", "/openapi.json",
    ):  # fmt: skip
        head, got = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/nothing").status_code == 404
    assert client.head("/v1/classify").status_code == 405
    assert 'requests_total{method="HEAD",route="/livez",status="200"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (data_uri(jpeg(1)[:200]), 400, "image_truncated"),
        ("data:image/jpeg;base64,", 400, "image_empty"),
        ("data:image/jpeg;base64,@@@", 400, "base64_invalid"),
        ("data:image/jpeg,abc", 400, "base64_invalid"),
        (data_uri(encoded(picture(), "GIF")), 415, "image_format_unsupported"),
        ("data:" + ";" * 1_000_000 + ",", 400, "base64_invalid"),
        (MOVING, 415, "image_animated"),
    ],
)  # fmt: skip
def test_bad_images_fail_with_their_index(client: TestClient, image: str, status: int, code: str) -> None:
    refused(embed(client, ["a", IMAGE, {"image": image}]), status, code, "input[2]")


def test_limits_of_the_request(make_client: MakeClient) -> None:
    client = make_client(
        max_texts=3, max_images=2, max_body_bytes=50_000, max_image_bytes=5000, max_image_pixels=10_000
    )
    refused(embed(client, ["a"] * 4), 413, "too_many_items", "input")
    refused(embed(client, [IMAGE] * 3), 413, "too_many_items", "input")
    assert embed(client, ["a"] * 3 + [IMAGE] * 2).status_code == 200
    refused(embed(client, "a" * 60_000), 413, "body_too_large")
    refused(client.post("/v1/embeddings", content=(b"a" for _ in range(60_000))), 413, "body_too_large")
    refused(
        embed(client, [{"image": data_uri(b"\xff\xd8\xff" + b"a" * 5000)}]),
        413,
        "image_too_large",
        "input[0]",
    )
    refused(
        embed(client, [{"image": data_uri(jpeg(1, width=200, height=60))}]),
        413,
        "too_many_pixels",
        "input[0]",
    )


def test_a_bad_item_fails_no_other_request(client: TestClient, runtime: FakeRuntime) -> None:
    runtime.hold()
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(embed, client, "first")
        assert runtime.started.wait(10)
        good = [pool.submit(embed, client, f"good {n}") for n in range(9)]
        bad = pool.submit(embed, client, ["fine", "poison here"])
        while runtime_depth(client) < 11:
            pass
        runtime.gate.set()
        assert first.result().status_code == 200
        for n, future in enumerate(good):
            np.testing.assert_array_equal(vectors(future.result())[0], runtime.text_vector(f"good {n}"))
        refused(bad.result(), 500, "inference_failed")
    assert embed(client, "after").status_code == 200


def runtime_depth(client: TestClient) -> int:
    service = client.app.state.service  # type: ignore[attr-defined]
    return int(sum(model.version.batcher.depth("text") for model in service.models.values()))


def test_a_full_queue_answers_429_with_a_time_to_come_back(
    make_client: MakeClient, runtime: FakeRuntime
) -> None:
    client = make_client(max_queue_items=4)
    runtime.hold()
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(embed, client, ["a", "b", "c"])
        assert runtime.started.wait(10)
        reply = embed(client, ["d", "e"])
        refused(reply, 429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1 and int(reply.headers["retry-after-ms"]) >= 1
        runtime.gate.set()
        assert held.result().status_code == 200
    refused(embed(client, list("abcde")), 413, "too_many_items")


def test_a_passed_deadline_answers_504_and_nothing_is_computed(
    client: TestClient, runtime: FakeRuntime
) -> None:
    runtime.hold()
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(embed, client, "first")
        assert runtime.started.wait(10)
        request = {"model": "fake", "input": ["late", IMAGE]}
        refused(
            client.post("/v1/embeddings", json=request, headers={"x-request-timeout-ms": "30"}),
            504,
            "deadline_exceeded",
        )
        runtime.gate.set()
        assert held.result().status_code == 200
    assert embed(client, "after").status_code == 200
    assert runtime.batches[-2:] == [("text", 1), ("text", 1)]  # first and after: late is not among them
    for wrong in ("0", "-1", "soon", "1.5", "9" * 30, "٣"):
        reply = client.post("/v1/embeddings", json=request, headers={"x-request-timeout-ms": wrong.encode()})
        refused(reply, 400, "invalid_request", "X-Request-Timeout-Ms")


def test_a_fingerprint_that_differs_is_refused(client: TestClient) -> None:
    request = {"model": "fake", "input": "a"}
    for value, status in (("fake-1", 200), ('"fake-1"', 200), ("fake-2", 412)):
        reply = client.post("/v1/embeddings", json=request, headers={"if-model-fingerprint": value})
        assert reply.status_code == status


def test_an_unforeseen_fault_is_a_500_that_tells_nothing(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve.requests")
    client = make_client()
    outside = TestClient(client.app, raise_server_exceptions=False)
    monkeypatch.setattr("serve.routes.embed", lambda *args, **options: 1 / 0)
    reply = embed(outside, "a secret")
    error = refused(reply, 500, "internal")
    assert "Zero" not in reply.text and "secret" not in error["message"]
    assert 'clipstack_serve_rejects_total{code="internal"} 1.0' in client.get("/metrics").text
    (line,) = [vars(record) for record in caplog.records if record.name == "serve.requests"]
    assert (line["status"], line["code"]) == (500, "internal")


# Classification


def reference_probabilities(
    runtime: FakeRuntime, image_row: Any, labels: list[str], templates: list[str]
) -> Any:
    rows = []
    for label in labels:
        mean = np.mean(
            [runtime.text_vector(t.replace("{}", label)).astype(np.float64) for t in templates], axis=0
        )
        rows.append(mean / np.linalg.norm(mean))
    logits = (
        runtime.info.logit_scale * np.stack(rows) @ image_row.astype(np.float64) + runtime.info.logit_bias
    )
    return logits, np.exp(logits) / np.exp(logits).sum()


def test_classify_is_the_softmax_of_scaled_cosines_with_an_ensemble_of_templates(
    client: TestClient, runtime: FakeRuntime
) -> None:
    labels, templates = ["cat", "dog", "green fish"], ["a {}", "the {} here", "my {c}"]
    request = {"inputs": [IMAGE], "labels": labels, "templates": templates, "top_k": 2}
    body = client.post("/v1/classify", json=request).json()
    image_row = vectors(embed(client, [IMAGE]))[0]
    plain = [template.replace("{c}", "{}") for template in templates]
    logits, probabilities = reference_probabilities(runtime, image_row, labels, plain)
    best = np.argsort(-logits)[:2]
    got = body["data"][0]["predictions"]
    assert [entry["label"] for entry in got] == [labels[i] for i in best]
    np.testing.assert_allclose([entry["probability"] for entry in got], probabilities[best], rtol=1e-5)
    np.testing.assert_allclose([entry["logit"] for entry in got], logits[best], rtol=1e-5)
    assert body["fingerprint"] == "fake-1" and body["data"][0]["abstained"] is False


def test_a_sigmoid_model_gives_each_label_its_own_probability(make_client: MakeClient) -> None:
    engine = FakeRuntime(probabilities="sigmoid", logit_bias=-3.0)
    client = make_client(engine)
    body = client.post("/v1/classify", json={"inputs": ["a pet"], "labels": ["cat", "dog"]}).json()
    for entry in body["data"][0]["predictions"]:
        row = engine.text_vector("a pet")
        logit = 10 * float(row @ engine.text_vector(f"a photo of a {entry['label']}.")) - 3
        assert entry["logit"] == pytest.approx(logit, abs=1e-5)
        assert entry["probability"] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-5)


def test_multi_label_of_a_softmax_model_compares_each_label_with_none(
    client: TestClient, runtime: FakeRuntime
) -> None:
    request = {"inputs": ["a pet"], "labels": ["cat", "dog"], "templates": ["a {}"], "multi_label": True}
    row = runtime.text_vector("a pet").astype(np.float64)
    for entry in client.post("/v1/classify", json=request).json()["data"][0]["predictions"]:
        margin = 10 * float(row @ (runtime.text_vector(f"a {entry['label']}") - runtime.text_vector("a")))
        assert entry["probability"] == pytest.approx(1 / (1 + np.exp(-margin)), rel=1e-5)


def test_abstaining_still_shows_the_predictions(client: TestClient) -> None:
    request = {"inputs": [IMAGE, "a pet"], "labels": ["cat", "dog"]}
    plain = client.post("/v1/classify", json=request).json()["data"]
    best = [entry["predictions"][0]["probability"] for entry in plain]
    marked = client.post("/v1/classify", json={**request, "abstain_below": sum(best) / 2}).json()["data"]
    assert [entry["abstained"] for entry in marked] == [value < sum(best) / 2 for value in best]
    assert [entry["predictions"] for entry in marked] == [entry["predictions"] for entry in plain]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "labels"),
        ({"labels": ["a"], "label_set": "b"}, 400, "labels"),
        ({"labels": []}, 400, "labels"),
        ({"labels": ["a", "a"]}, 400, "labels[1]"),
        ({"labels": ["a", " "]}, 400, "labels[1]"),
        ({"labels": ["a", 3]}, 400, "labels[1]"),
        ({"labels": ["a"], "templates": "best"}, 400, "templates"),
        ({"labels": ["a"], "templates": ["{} and {}"]}, 400, "templates[0]"),
        ({"labels": ["a"], "templates": ["{}", "none"]}, 400, "templates[1]"),
        ({"labels": ["a", "b " * 30]}, 400, "labels[1]"),
        ({"labels": ["a"], "top_k": 0}, 400, "top_k"),
        ({"labels": ["a"], "abstain_below": 1.5}, 400, "abstain_below"),
        ({"labels": [str(n) for n in range(300)]}, 413, "labels"),
        ({"label_set": "nope"}, 404, None),
    ],
)  # fmt: skip
def test_wrong_questions_are_refused(client: TestClient, fields: Any, status: int, param: str | None) -> None:
    reply = client.post("/v1/classify", json={"inputs": ["x"], **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


def test_a_reply_holds_a_bounded_number_of_predictions(
    client: TestClient, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kilobytes could ask for hundreds of megabytes: that is refused before anything is computed."""
    monkeypatch.setattr("serve.operations.MAX_PREDICTIONS", 100)
    computed = len(runtime.batches)
    asked = {"inputs": ["x"] * 6, "labels": [f"label {number}" for number in range(20)]}
    for top_k in (17, 20, 10**9):
        reply = client.post("/v1/classify", json={**asked, "top_k": top_k})
        assert "one reply may hold 100" in refused(reply, 400, "invalid_request", "top_k")["message"]
    assert len(runtime.batches) == computed
    reply = client.post("/v1/classify", json={**asked, "top_k": 16})
    assert [len(entry["predictions"]) for entry in reply.json()["data"]] == [16] * 6
    few = {"inputs": ["x"] * 50, "labels": ["cat", "dog"], "top_k": 10**9}
    assert client.post("/v1/classify", json=few).status_code == 200


@pytest.mark.parametrize(("num_labels", "in_pool"), [(256, True), (4, False)])
def test_many_logits_are_computed_beside_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, num_labels: int, in_pool: bool
) -> None:
    threads: list[str] = []

    def noted(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return judge(*args, **options)

    monkeypatch.setattr("serve.operations.judge", noted)
    labels = [f"label {number}" for number in range(num_labels)]
    body = client.post("/v1/classify", json={"inputs": ["x"] * 9, "labels": labels}).json()
    assert len(body["data"]) == 9
    assert [name.startswith("decode") for name in threads] == [in_pool]


def test_a_template_is_never_a_format_string(client: TestClient) -> None:
    request = {"inputs": ["x"], "labels": ["{0.__class__}", "{}", "%s"], "templates": ["a {} b"]}
    body = client.post("/v1/classify", json=request).json()
    assert {entry["label"] for entry in body["data"][0]["predictions"]} == set(request["labels"])


def test_named_templates_are_those_of_evaluation(client: TestClient, runtime: FakeRuntime) -> None:
    client.post("/v1/classify", json={"inputs": ["x"], "labels": ["cat"], "templates": "simple"})
    assert sum(size for kind, size in runtime.batches) >= 7
    reply = client.post("/v1/classify", json={"inputs": ["x"], "labels": ["cat"], "templates": "openai"})
    assert reply.status_code == 200


def test_a_classify_upload(client: TestClient) -> None:
    files = [("inputs", ("a.jpg", jpeg(1)))]
    reply = client.post("/v1/classify", data={"labels": ["cat", "dog"], "top_k": "1"}, files=files)
    whole = client.post("/v1/classify", json={"inputs": [IMAGE], "labels": ["cat", "dog"], "top_k": 1})
    assert reply.json()["data"] == whole.json()["data"]


# Label sets


def test_a_label_set_costs_its_texts_once(client: TestClient, runtime: FakeRuntime) -> None:
    created = client.put("/v1/label-sets/pets", json={"labels": ["cat", "dog"], "templates": ["my {}"]})
    assert (created.status_code, created.json()["templates"]) == (201, ["my {}"])
    by_set = client.post("/v1/classify", json={"inputs": [IMAGE], "label_set": "pets"}).json()
    by_labels = client.post(
        "/v1/classify", json={"inputs": [IMAGE], "labels": ["cat", "dog"], "templates": ["my {}"]}
    ).json()
    assert by_set["data"] == by_labels["data"]
    runtime.batches.clear()
    client.post("/v1/classify", json={"inputs": [IMAGE], "label_set": "pets"})
    assert runtime.batches == [("image", 1)]
    assert client.put("/v1/label-sets/pets", json={"labels": ["cat"]}).status_code == 200
    assert client.get("/v1/label-sets/pets").json()["labels"] == ["cat"]


def test_label_sets_survive_a_restart(make_client: MakeClient) -> None:
    first = make_client()
    first.put("/v1/label-sets/pets", json={"labels": ["cat", "dog"]})
    second = make_client(FakeRuntime())
    assert [entry["id"] for entry in second.get("/v1/label-sets").json()["data"]] == ["pets"]
    assert second.delete("/v1/label-sets/pets").json() == {
        "id": "pets",
        "object": "label_set",
        "deleted": True,
    }
    refused(second.get("/v1/label-sets/pets"), 404, "label_set_not_found")
    refused(second.delete("/v1/label-sets/pets"), 404, "label_set_not_found")


def test_label_sets_are_limited_and_checked(make_client: MakeClient) -> None:
    client = make_client(max_label_sets=1, max_label_set_labels=2)
    refused(client.put("/v1/label-sets/a", json={"labels": ["a", "b", "c"]}), 413, "too_many_items", "labels")
    refused(
        client.put("/v1/label-sets/a", json={"labels": ["a", "b " * 30]}), 400, "text_too_long", "labels[1]"
    )
    refused(client.put("/v1/label-sets/%2e%2e", json={"labels": ["a"]}), 400, "invalid_request", "set_id")
    assert client.put("/v1/label-sets/a", json={"labels": ["a"]}).status_code == 201
    refused(client.put("/v1/label-sets/b", json={"labels": ["a"]}), 413, "too_many_items")


def test_label_sets_are_limited_in_prompts_and_in_bytes(
    make_client: MakeClient, runtime: FakeRuntime
) -> None:
    client = make_client(max_label_set_prompts=6, max_label_set_bytes=200)
    many = {"labels": list("abcd"), "templates": ["a {}", "the {}"]}
    runtime.batches.clear()
    refused(client.put("/v1/label-sets/a", json=many), 413, "too_many_items", "labels")
    assert runtime.batches == []
    assert client.put("/v1/label-sets/a", json={"labels": ["a", "b"]}).status_code == 201
    large = {"labels": ["x" * 150]}
    refused(client.put("/v1/label-sets/b", json=large), 413, "label_sets_full")
    assert [entry["id"] for entry in client.get("/v1/label-sets").json()["data"]] == ["a"]
    # What a set itself holds is not counted against its successor.
    assert client.put("/v1/label-sets/a", json=large).status_code == 200
    refused(client.put("/v1/label-sets/b", json={"labels": ["a", "b"]}), 413, "label_sets_full")
    client.delete("/v1/label-sets/a").raise_for_status()
    assert client.put("/v1/label-sets/b", json={"labels": ["a", "b"]}).status_code == 201


def test_a_locked_label_set_file_answers_503_and_holds_up_nobody(
    make_client: MakeClient, tmp_path: Path
) -> None:
    client = make_client(label_set_file=tmp_path / "locked.sqlite3")
    client.app.state.service.label_sets._db.execute("PRAGMA busy_timeout=1000")  # type: ignore[attr-defined]
    with closing(sqlite3.connect(tmp_path / "locked.sqlite3")) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN EXCLUSIVE")
        put = pool.submit(client.put, "/v1/label-sets/a", json={"labels": ["a"]})
        answered = 0
        while not put.done():
            assert embed(client, "a cat").status_code == 200
            answered += 1
        refused(put.result(), 503, "storage_failed")
        assert put.result().headers["retry-after"] and answered > 2
    assert client.put("/v1/label-sets/a", json={"labels": ["a"]}).status_code == 201


@pytest.mark.parametrize(
    ("labels", "templates", "param"),
    [
        (["a"], ["{}" + " " * 9000], "templates[0]"),
        (["a", "b" + " " * 9000], ["a {}"], "labels[1]"),
    ],
)
def test_long_labels_and_templates_are_refused_before_they_are_multiplied(
    client: TestClient, labels: list[str], templates: list[str], param: str
) -> None:
    put = client.put("/v1/label-sets/a", json={"labels": labels, "templates": templates})
    refused(put, 400, "text_too_long", param)
    asked = {"inputs": ["x"], "labels": labels, "templates": templates}
    refused(client.post("/v1/classify", json=asked), 400, "text_too_long", param)


def test_labels_must_fit_into_the_template_of_most_tokens_not_of_most_letters(client: TestClient) -> None:
    templates = ["a {} " + "x" * 100, "a b c d e f g h {}"]
    fits = client.put("/v1/label-sets/a", json={"labels": ["one two"], "templates": templates})
    assert fits.status_code == 201
    over = client.put("/v1/label-sets/a", json={"labels": ["one", "one two three"], "templates": templates})
    refused(over, 400, "text_too_long", "labels[1]")


def test_a_large_classifier_is_computed_a_few_labels_at_a_time(
    client: TestClient, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def watched(labels: Any, templates: Any) -> Any:
        sizes.append(len(labels) * len(templates))
        return prompts_of(labels, templates)

    monkeypatch.setattr("serve.operations.prompts_of", watched)
    labels, templates = [f"thing {n}" for n in range(100)], [f"t{n} {{}}" for n in range(30)]
    asked = {"inputs": [IMAGE], "labels": labels, "templates": templates, "top_k": 100}
    body = client.post("/v1/classify", json=asked).json()
    assert sum(sizes) == 3000 and max(sizes) <= 64
    logits, _ = reference_probabilities(runtime, vectors(embed(client, [IMAGE]))[0], labels, templates)
    got = {entry["label"]: entry["logit"] for entry in body["data"][0]["predictions"]}
    np.testing.assert_allclose([got[label] for label in labels], logits, rtol=1e-4, atol=1e-5)


# Similarity


def test_similarity_is_a_matrix_of_cosines(client: TestClient) -> None:
    images = [data_uri(jpeg(seed)) for seed in range(3)]
    body = client.post(
        "/v1/similarity",
        json={"texts": ["a cat", "a dog"], "images": [images[0], {"image": images[1]}, images[2]]},
    )
    rows = vectors(embed(client, ["a cat", "a dog", *({"image": image} for image in images)]))
    np.testing.assert_allclose(body.json()["data"], rows[:2] @ rows[2:].T, atol=1e-6)
    refused(
        client.post("/v1/similarity", json={"texts": ["a"], "images": ["AAAA"]}),
        415,
        "image_format_unsupported",
        "images[0]",
    )
    refused(
        client.post("/v1/similarity", json={"texts": ["a", "b " * 30], "images": images}),
        400,
        "text_too_long",
        "texts[1]",
    )


# Models, reload


def test_models_are_listed_as_openai_does(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["fingerprint"]) == ("fake", "model", "fake-1")
    assert (model["dimensions"], model["context_length"], model["image_size"]) == (16, 12, [8, 8])
    assert client.get("/v1/models/fake").json() == model
    refused(client.get("/v1/models/nope"), 404, "model_not_found", "model")


# Tokens, limits, origins


def test_tokens_guard_the_api_and_not_the_probes(make_client: MakeClient) -> None:
    hashes = (hash_token("one"), hash_token("two"))
    client = make_client(token_hashes=hashes, admin_token_hashes=(hash_token("root"),))
    for path in ("/livez", "/readyz", "/", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/label-sets", "/v1/anything"):
        reply = client.get(path)
        refused(reply, 401, "unauthorized")
        assert reply.headers["www-authenticate"] == "Bearer"
    for token, status in (("one", 200), ("two", 200), ("root", 200), ("three", 401), ("", 401)):
        assert client.get("/v1/models", headers={"authorization": f"Bearer {token}"}).status_code == status
    assert client.get("/v1/models", headers={"authorization": "Basic one"}).status_code == 401
    reload = {"url": "/v1/models/reload", "json": {}}
    assert client.post(**reload, headers={"authorization": "Bearer one"}).status_code == 401
    assert client.post(**reload, headers={"authorization": "Bearer root"}).status_code == 200


def test_nobody_may_reload_where_no_admin_token_is_set(client: TestClient) -> None:
    refused(client.post("/v1/models/reload", json={}), 401, "unauthorized")


def test_each_token_has_a_rate_limit_of_its_own(make_client: MakeClient) -> None:
    client = make_client(
        token_hashes=(hash_token("one"), hash_token("two")), rate_limit_per_s=0.001, rate_limit_burst=2
    )
    statuses = [
        client.get("/v1/models", headers={"authorization": "Bearer one"}).status_code for _ in range(4)
    ]
    assert statuses == [200, 200, 429, 429]
    limited = client.get("/v1/models", headers={"authorization": "Bearer one"})
    refused(limited, 429, "rate_limited")
    assert int(limited.headers["retry-after"]) > 100
    assert client.get("/v1/models", headers={"authorization": "Bearer two"}).status_code == 200


def test_other_origins_are_refused_unless_named(make_client: MakeClient, client: TestClient) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/classify", headers=ask).headers
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=ask).headers
    named = make_client(
        FakeRuntime(), cors_origins=("https://app.example",), token_hashes=(hash_token("one"),)
    )
    assert (
        named.options("/v1/classify", headers=ask).headers["access-control-allow-origin"]
        == "https://app.example"
    )
    unauthorized = named.get("/v1/models", headers={"origin": "https://app.example"})
    refused(unauthorized, 401, "unauthorized")  # and the page may read that
    assert unauthorized.headers["access-control-allow-origin"] == "https://app.example"
    other = named.options("/v1/classify", headers={**ask, "origin": "https://evil.example"})
    refused(other, 400, "invalid_request")
    assert "access-control-allow-origin" not in other.headers
    method = named.options("/v1/classify", headers={**ask, "access-control-request-method": "PATCH"})
    refused(method, 400, "invalid_request")  # and the page may read that
    assert method.headers["access-control-allow-origin"] == "https://app.example"


# Health, metrics, pages, logs


def test_readyz_sends_a_canary_through_the_queue_and_believes_its_vector(
    client: TestClient, runtime: FakeRuntime
) -> None:
    runtime.batches.clear()
    assert client.get("/readyz").json() == {"status": "ok"}
    assert sorted(runtime.batches) == [("image", 1), ("text", 1)]


def test_readyz_notices_a_model_whose_vectors_have_changed(
    client: TestClient, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "vector", lambda content: unit(b"damaged" + content, 16))
    refused(client.get("/readyz"), 503, "not_ready")
    assert client.get("/livez").status_code == 200


def test_requests_before_the_model_is_loaded_get_503(make_client: MakeClient) -> None:
    may_load = threading.Event()

    class Slow(FakeRuntime):
        def encode_images(self, images: Any) -> Any:
            assert may_load.wait(30)
            return super().encode_images(images)

    client = make_client(Slow(), load_in_background=True)
    try:
        refused(client.get("/readyz"), 503, "loading")
        reply = embed(client, "a")
        refused(reply, 503, "loading")
        assert reply.headers["retry-after"]
        assert client.get("/livez").status_code == 200
        assert client.get("/v1/models").json()["data"] == []
    finally:
        may_load.set()


def test_a_start_that_fails_in_whatever_way_is_told_and_not_taken_for_loading(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> FakeRuntime:
        raise AttributeError("no such kernel")

    monkeypatch.setattr("serve.app.loaders_of", lambda settings, runtime: {"fake": broken})
    client = make_client(load_in_background=True)
    service = cast(FastAPI, client.app).state.service
    wait_until(lambda: service.load_error is not None)
    refused(client.get("/readyz"), 503, "not_ready")
    refused(embed(client, "a"), 503, "not_ready")
    assert client.get("/livez").status_code == 200
    assert [record.reason for record in caplog.records if record.message == "start failed"] == [
        "the model cannot be loaded (AttributeError: no such kernel)"
    ]


def test_a_start_that_fails_outside_of_a_model_is_told_as_well(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr("serve.service.LabelSetStore", broken)
    client = make_client(load_in_background=True)
    service = cast(FastAPI, client.app).state.service
    wait_until(lambda: service.load_error is not None)
    assert str(service.load_error) == "the server cannot start (TypeError: a fault of ours)"
    refused(client.get("/readyz"), 503, "not_ready")


def test_metrics_tell_requests_batches_stages_and_rejects(client: TestClient) -> None:
    embed(client, ["a", IMAGE])
    embed(client, [""])
    text = client.get("/metrics").text
    for line in (
        'clipstack_serve_requests_total{method="POST",route="/v1/embeddings",status="200"} 1.0',
        'clipstack_serve_requests_total{method="POST",route="/v1/embeddings",status="400"} 1.0',
        'clipstack_serve_rejects_total{code="text_empty"} 1.0',
        'clipstack_serve_queue_depth{kind="text",model="fake"} 0.0',
        'clipstack_serve_model_info{engine="fake",fingerprint="fake-1",model="fake"} 1.0',
        'clipstack_serve_stage_seconds_count{stage="decode"} 1.0',
    ):
        assert line in text, line
    assert 'clipstack_serve_batch_size_count{kind="image",model="fake"}' in text


def test_request_ids_are_kept_where_they_are_sound(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    for bad in ("with space", "x" * 200, 'quote"'):
        made = client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad and len(made) == 32


def test_log_lines_are_json_and_hold_nothing_of_the_content(
    client: TestClient,
    capsys: pytest.CaptureFixture[str],
    own_logging: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure_logging("debug")
    embed(client, ["my secret text", IMAGE], user="me@example.org")
    embed(client, ["my secret text", {"image": "c2VjcmV0"}])
    written = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own, without pytest's
        configure_logging("debug")
        upload = {"content-type": "multipart/form-data; boundary=XX"}
        client.post("/v1/embeddings", content=b"s3cret", headers=upload)
        logging.getLogger("a.library").warning("beware")
    written += capsys.readouterr().err
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["event"] for line in lines][-2:] == ["request", "beware"]
    assert [line["status"] for line in lines if line["event"] == "request"] == [200, 415, 400]
    assert lines[0]["route"] == "/v1/embeddings" and lines[0]["items"] == 2
    assert "secret" not in written and "c2Vj" not in written and "me@example" not in written


def test_pages_come_from_this_server_alone(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http://" not in page.text and "https://" not in page.text
    refused(client.get("/static/../app.py"), 404, "not_found")
    refused(client.get("/static/nothing.js"), 404, "not_found")


@pytest.mark.parametrize("prefix", ["/clip", ""])
def test_a_proxy_may_keep_or_strip_its_prefix(make_client: MakeClient, prefix: str) -> None:
    client = make_client(root_path="/clip", token_hashes=(hash_token("one"),))
    assert client.get(prefix + "/livez").status_code == 200
    refused(client.get(prefix + "/v1/models"), 401, "unauthorized")
    assert client.get(prefix + "/v1/models", headers={"authorization": "Bearer one"}).status_code == 200
