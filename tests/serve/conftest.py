"""Shared fixtures: apps around a fake runtime, in process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.app import create_app
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime

MakeClient = Callable[..., TestClient]


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def make_client(tmp_path: Path, runtime: FakeRuntime) -> Iterator[MakeClient]:
    """Start an app with these settings; it stops with the test. One batch at a time, which tests can hold."""
    with ExitStack() as stack:

        def make(engine: Any = None, **values: Any) -> TestClient:
            plain = {
                "models": ("fake=unused",),
                "device_lanes": 1,
                "label_set_file": tmp_path / "sets.sqlite3",
            }
            values = {**plain, **values}
            settings = Settings.model_validate(values)
            return stack.enter_context(TestClient(create_app(settings, engine or runtime)))

        yield make


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Let a test configure logging, and put everything back after it."""
    loggers = [
        logging.getLogger(name)
        for name in ("serve", "uvicorn", "uvicorn.error", "uvicorn.access", "py.warnings")
    ]
    before = [(logger.handlers, logger.propagate, logger.level, logger.disabled) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (handlers, propagate, level, disabled) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
        logger.setLevel(level)


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()
