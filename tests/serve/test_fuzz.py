"""No input hurts: requests drawn from the OpenAPI document, damaged images, hostile texts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.app import create_app
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server
from tests.serve.pictures import data_uri, encoded, jpeg, picture

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    settings = Settings(
        models=("fake=unused",),  # type: ignore[arg-type]
        label_set_file=tmp_path / "sets.sqlite3",
        max_image_pixels=1_000_000,
    )
    with live_server(create_app(settings, FakeRuntime())) as base:
        yield base


# Requests from the document


def send_requests_of_the_document(url: str, *, examples: int) -> dict[str, int]:
    """Requests drawn from the document, right ones and wrong ones, to each operation; how many of each were
    sent.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    sent: dict[str, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            sent[f"{operation.label} {mode.value}"] = _send(operation, mode, examples)
    return sent


def _send(operation: Any, mode: GenerationMode, examples: int) -> int:
    sent = 0

    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        nonlocal sent
        sent += 1
        case.call_and_validate(checks=CHECKS)

    try:
        check()
    except hypothesis.errors.Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "an operation that takes nothing cannot be called wrongly"
    return sent


def test_requests_from_the_document_get_what_the_document_says(url: str) -> None:
    sent = send_requests_of_the_document(url, examples=8)
    assert sum(sent.values()) >= 100


@pytest.mark.slow
def test_many_requests_from_the_document_get_what_the_document_says(url: str) -> None:
    sent = send_requests_of_the_document(url, examples=150)
    assert sum(sent.values()) >= 2000


# Damaged images and hostile texts


@dataclass(frozen=True)
class Bad:
    name: str
    item: Any
    statuses: tuple[int, ...]


def images(count: int) -> Iterator[Bad]:
    """The kinds that must be answered with a known code, then bit-flipped files up to `count` in all."""
    yield from itertools.islice(itertools.chain(_named_images(), _flipped_images()), count)


def _named_images() -> Iterator[Bad]:
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(1, width=200, height=150), format)
        for part in range(16):
            yield Bad(
                f"{format} cut at {part}/16", {"image": data_uri(data[: len(data) * part // 16])}, (400,)
            )
        yield Bad(f"{format} with bytes after its end", {"image": data_uri(data + b"\0" * 500)}, (200,))
        yield Bad(f"{format} called something else", {"image": data_uri(data, "text/plain")}, (200,))
    exif = Image.Exif()
    exif[0x0112] = 6
    ok = [
        encoded(picture(2).convert("CMYK"), "JPEG"), encoded(picture(2), "JPEG", exif=exif),
        encoded(picture(2).convert("L"), "JPEG"), encoded(picture(2), "JPEG", progressive=True),
        encoded(Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)), "PNG"),
        encoded(picture(2).convert("P"), "PNG"), encoded(picture(2).convert("RGBA"), "WEBP"),
        encoded(Image.new("RGB", (1, 1)), "PNG"), encoded(Image.new("RGB", (3000, 1)), "PNG"),
    ]  # fmt: skip
    for index, data in enumerate(ok):
        yield Bad(f"unusual and sound {index}", {"image": data_uri(data)}, (200,))
    for format in ("GIF", "BMP", "TIFF", "ICO", "PPM"):
        yield Bad(format, {"image": data_uri(encoded(picture(), format))}, (415,))
    for format in ("PNG", "WEBP"):
        moving = encoded(picture(1), format, save_all=True, append_images=[picture(2)])
        yield Bad(f"animated {format}", {"image": data_uri(moving)}, (415,))
    yield Bad("bomb", {"image": data_uri(encoded(Image.new("1", (9000, 9000)), "PNG"))}, (413,))
    yield Bad("text as image", {"image": data_uri(b"just some text")}, (415,))
    yield Bad("no base64", {"image": "data:image/jpeg;base64,%%%"}, (400,))
    yield Bad("no data", {"image": ""}, (400,))
    yield Bad("svg", {"image": data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, (415,))


def _flipped_images() -> Iterator[Bad]:
    rng = random.Random(0)
    files = [
        encoded(picture(n, width=120, height=90), format)
        for n, format in enumerate(("JPEG", "PNG", "WEBP", "JPEG", "PNG"))
    ]
    for number in itertools.count():
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        yield Bad(f"flipped {number}", {"image": data_uri(bytes(data))}, (200, 400, 413, 415))


def texts() -> Iterator[Bad]:
    for name, text in {
        "emoji": "🚲🌧️👩‍👩‍👧",
        "right to left": "\u202eمرحبا بالعالم\u202c",
        "controls": "a\x01\x02\x7f\x1b[31mb",
        "null": "a\0b",
        "combining": "e" + "\u0301" * 20,
        "private use": "\ue000\U0010ffff",
        "html": "&lt;b&gt; <script>alert(1)</script>",
        "format string": "{0.__class__} %s %n ${jndi}",
        "sql": "'; DROP TABLE label_sets; --",
        "newlines": "a\r\nb\n\nc",
    }.items():
        yield Bad(name, {"text": text}, (200,))
    yield Bad("1 MB", {"text": "long " * 200_000}, (400,))
    yield Bad("1 MB in one word", {"text": "a" * 1_000_000}, (400,))
    yield Bad("blank", {"text": " \t\n "}, (400,))
    yield Bad("number", {"text": 3}, (400,))
    yield Bad("nested", {"text": {"text": "a"}}, (400,))


def check_each_and_a_good_one_after(url: str, cases: Iterator[Bad]) -> int:
    """Every case gets one of its statuses, and a good request right after it gets the right vectors."""
    good = {"model": "fake", "input": ["a cat", {"image": data_uri(jpeg(7))}]}
    count = 0
    with httpx.Client(base_url=url, timeout=60) as client:
        right = client.post("/v1/embeddings", json=good).json()["data"]
        for case in cases:
            reply = client.post("/v1/embeddings", json={"model": "fake", "input": ["first", case.item]})
            assert reply.status_code in case.statuses, (case.name, reply.text[:300])
            if reply.status_code != 200:
                assert reply.json()["error"]["param"] == "input[1]", (case.name, reply.text[:300])
            assert client.post("/v1/embeddings", json=good).json()["data"] == right, case.name
            count += 1
    return count


def test_damaged_images_get_the_right_code_and_hurt_nobody_after_them(url: str) -> None:
    assert check_each_and_a_good_one_after(url, images(200)) == 200


def test_hostile_texts_get_the_right_code_and_hurt_nobody_after_them(url: str) -> None:
    assert check_each_and_a_good_one_after(url, texts()) == 15


@pytest.mark.slow
def test_thousands_of_damaged_images_get_the_right_code_and_hurt_nobody(url: str) -> None:
    assert check_each_and_a_good_one_after(url, images(2500)) == 2500
