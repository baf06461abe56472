"""Prometheus, with the files of docker/prometheus, watches a running server: every panel has data."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.security import hash_token
from tests.clipstack.launching import wait_until
from tests.docker.test_files import DOCKER, alert_expressions, dashboard, documents
from tests.serve.models import save_model, tiny_model
from tests.serve.process import server_process
from tests.serve.test_process import Load

TARGET = "api:8000"
"""The server, as compose.yaml names it."""
DATA_TIMEOUT_S = 90
START_TIMEOUT_S = 30
ADMIN_TOKEN = "root"
ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
"""What Prometheus 3 asks for."""


class Prometheus:
    """A running one's HTTP API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1", timeout=30)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer. AssertionError with Prometheus' own words for any other answer."""
        reply = self._client.get(path, params=parameters).json()
        assert reply["status"] == "success", f"{parameters}: {reply.get('error')}"
        return reply["data"]

    def values(self, expression: str) -> list[float]:
        """Of an expression now, one for each series, without those that are not a number."""
        found = [float(entry["value"][1]) for entry in self.get("/query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """With the files of docker/prometheus; only the server's address is another."""
    shutil.copytree(DOCKER / "prometheus", folder)
    config = (folder / "prometheus.yml").read_text()
    assert config.count(TARGET) == 1
    (folder / "prometheus.yml").write_text(config.replace(TARGET, target))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address={address}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return httpx.get(f"http://{address}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, START_TIMEOUT_S, "readiness of Prometheus")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def panel_expressions(instance: str) -> dict[str, list[str]]:
    """Panel -> what Grafana sends for it: its variables filled in as it does, for a scrape every 5 s."""
    (source,) = documents(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    interval_s = 4 * int(source["jsonData"]["timeInterval"].rstrip("s"))
    return {
        panel["title"]: [
            target["expr"].replace("$__rate_interval", f"{interval_s}s").replace("$instance", instance)
            for target in panel["targets"]
        ]
        for panel in dashboard()["panels"]
    }


def ask_everything(url: str) -> None:
    """Good requests, bad ones, and a reload: after them every panel has something to show."""
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    reply = httpx.post(f"{url}/v1/models/reload", json={"model": "demo"}, headers=admin, timeout=60)
    assert reply.status_code == 200, reply.text
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "none", "input": "a"}).status_code == 404


@pytest.mark.slow
def test_every_panel_has_data_and_every_alert_is_evaluated(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed; Debian's package of that name has it")
    folder = save_model(tmp_path / "demo", tiny_model())
    hashes = json.dumps([hash_token(ADMIN_TOKEN)])
    with server_process(
        "--model", str(folder), state=tmp_path / "state", CLIPSTACK_SERVE_ADMIN_TOKEN_HASHES=hashes
    ) as server:
        server.wait_for("model loaded")
        asked = httpx.get(f"{server.url}/metrics", headers={"Accept": ACCEPT})
        assert asked.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        target = server.url.removeprefix("http://")
        with prometheus(tmp_path / "prometheus", target) as watcher:
            load = Load(server.url)
            load.start()
            ask_everything(server.url)
            panels = panel_expressions(target.replace(".", r"\\."))
            assert len(panels) >= 12
            for title, expressions in panels.items():
                for expression in expressions:
                    what = f"{title}: {expression}"
                    wait_until(partial(watcher.values, expression), DATA_TIMEOUT_S, what)
            variable = dashboard()["templating"]["list"][0]["query"]["query"]
            metric = variable.removeprefix("label_values(").removesuffix(", instance)")
            assert watcher.get("/label/instance/values", **{"match[]": metric}) == [target]

            # A healthy server raises nothing; Prometheus itself has evaluated every rule without complaint.
            assert [watcher.get("/query", query=e)["result"] for e in alert_expressions()] == [
                [] for _ in alert_expressions()
            ]
            wait_until(
                lambda: {rule["health"] for rule in rules(watcher)} == {"ok"}, DATA_TIMEOUT_S, "evaluation"
            )
            assert len(rules(watcher)) == len(alert_expressions())

            # One that is gone is noticed.
            assert server.stop(signal.SIGTERM) == 0
            load.join(60)
            assert load.broken == []
            wait_until(lambda: "ClipstackDown" in pending(watcher), DATA_TIMEOUT_S, "the alert")


def rules(watcher: Prometheus) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = watcher.get("/rules")["groups"][0]["rules"]
    return found


def pending(watcher: Prometheus) -> set[str]:
    return {alert["labels"]["alertname"] for alert in watcher.get("/alerts")["alerts"]}
