"""No input hurts: requests drawn from the OpenAPI document, damaged images, hostile texts."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, Verbosity, settings as hypothesis_settings
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.app import create_app
from serve.settings import Settings
from tests.serve.conftest import MakeClient
from tests.serve.fakes import FakeRuntime
from tests.serve.pictures import data_uri, encoded, jpeg, picture

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip


def fuzz_operations(app: Any, *, examples: int) -> int:
    """Requests drawn from the document, right and wrong ones, to every operation; how many were sent."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    schema.config.generation.update(modes=schemathesis.GenerationMode.all())
    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()

        def check(case: Any) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=CHECKS)

        import hypothesis

        wrapped = hypothesis.given(case=strategy)(lambda case: check(case))  # noqa: B023
        hypothesis_settings(
            max_examples=examples, deadline=None, derandomize=True, database=None, verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )(wrapped)()  # fmt: skip
    return sent


@pytest.fixture
def app(tmp_path: Path) -> Any:
    settings = Settings(models=("fake=unused",), label_set_file=tmp_path / "sets.sqlite3")  # type: ignore[arg-type]
    return create_app(settings, FakeRuntime())


def test_requests_from_the_document_get_what_the_document_says(app: Any) -> None:
    assert fuzz_operations(app, examples=12) >= 100
