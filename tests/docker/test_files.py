"""The files of docker/: linted, parsed, and true to the server that they are made for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.utils.build import exclude_paths
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve.app import create_app
from serve.errors import ErrorCode
from serve.metrics import Metrics
from serve.settings import ENV_PREFIX, Settings
from tests.docs.pages import read_blocks
from tests.serve.fakes import FakeRuntime

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
YAML_FILES = sorted([*DOCKER.rglob("*.yaml"), *DOCKER.rglob("*.yml")])
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
TARGET_LABELS = {"instance", "job", "namespace", "pod", "le"}
"""Labels that Prometheus itself puts on series."""


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def compose() -> dict[str, Any]:
    (document,) = documents(DOCKER / "compose.yaml")
    table: dict[str, Any] = document
    return table


def kubernetes(kind: str) -> dict[str, Any]:
    (found,) = [entry for entry in documents(DOCKER / "kubernetes.yaml") if entry["kind"] == kind]
    table: dict[str, Any] = found
    return table


# Linters that others wrote.


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_compose_file_keeps_to_the_specification() -> None:
    tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*tool, DOCKER / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_takes_the_prometheus_files(arguments: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    done = subprocess.run(
        ["promtool", *arguments], cwd=DOCKER / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DOCKER)))
def test_yaml_files_parse(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


def test_every_alert_is_tested() -> None:
    (rules,) = documents(DOCKER / "prometheus/alerts.yml")
    (tests,) = documents(DOCKER / "prometheus/alerts_test.yml")
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    raised = {
        entry["alertname"]
        for test in tests["tests"]
        for entry in test["alert_rule_test"]
        if entry["exp_alerts"]
    }
    assert raised == alerts


# Metrics that the dashboard, the alerts and the autoscaler name.


def alert_expressions() -> list[str]:
    (rules,) = documents(DOCKER / "prometheus/alerts.yml")
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/clipstack.json").read_text())
    return table


def dashboard_expressions() -> list[str]:
    variables = [entry["query"]["query"] for entry in dashboard()["templating"]["list"]]
    return variables + [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def autoscaler_expressions() -> list[str]:
    scaled = [
        entry["pods"]["metric"]["name"] for entry in kubernetes("HorizontalPodAutoscaler")["spec"]["metrics"]
    ]
    values = yaml.safe_load(kubernetes("ConfigMap")["data"]["values.yaml"])
    return scaled + [rule["seriesQuery"] for rule in values["rules"]["custom"]]


EXPRESSIONS = [*alert_expressions(), *dashboard_expressions(), *autoscaler_expressions()]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of every series that /metrics of a running app has or can have."""
    settings = Settings.model_validate(
        {"models": ("demo=unused",), "label_set_file": tmp_path_factory.mktemp("state") / "sets.sqlite3"}
    )
    with TestClient(create_app(settings, FakeRuntime())) as client:
        assert client.post("/v1/embeddings", json={"model": "demo", "input": "a cat"}).status_code == 200
        text = client.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len(families) > 5
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_that_is_named_exists(expression: str, exposed: set[str]) -> None:
    named = set(re.findall(r"clipstack_serve_\w+", expression))
    assert named or "up{" in expression
    assert named <= exposed


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_label_that_is_named_exists(expression: str) -> None:
    collectors = [value for value in vars(Metrics()).values() if hasattr(value, "_labelnames")]
    known = TARGET_LABELS.union(*(collector._labelnames for collector in collectors))
    matched = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression)
    grouped = [
        name.strip()
        for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
        for name in names.split(",")
    ]
    assert set(matched + grouped) <= known


def test_every_error_code_that_is_named_exists() -> None:
    codes = {code.value for code in ErrorCode}
    named = [
        code
        for expression in EXPRESSIONS
        for value in re.findall(r'code=~?"([^"]+)"', expression)
        for code in value.split("|")
    ]
    assert named and set(named) <= codes


def test_the_dashboard_shows_what_an_operator_asks_for() -> None:
    shown = " ".join(dashboard_expressions())
    for metric in ("queue_depth", "batch_size", "stage_seconds", "rejects_total", "model_info"):
        assert f"clipstack_serve_{metric}" in shown


def test_the_dashboard_reads_the_provisioned_source() -> None:
    (sources,) = documents(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")
    known = {source["uid"] for source in sources["datasources"]}
    used = {
        target["datasource"]["uid"]
        for panel in dashboard()["panels"]
        for target in [panel, *panel["targets"]]
    }
    assert used == known
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_grafana_and_prometheus_find_their_files_where_compose_mounts_them() -> None:
    services = compose()["services"]
    mounts = [entry.split(":") for name in ("grafana", "prometheus") for entry in services[name]["volumes"]]
    inside = {target: DOCKER / source for source, target, *_ in mounts if source.startswith("./")}
    assert all(folder.is_dir() for folder in inside.values())
    (dashboards,) = documents(DOCKER / "grafana/provisioning/dashboards/clipstack.yaml")
    assert [provider["options"]["path"] for provider in dashboards["providers"]] == [
        "/etc/grafana/dashboards"
    ]
    assert (inside["/etc/grafana/dashboards"] / "clipstack.json").is_file()
    (prometheus,) = documents(inside["/etc/prometheus"] / "prometheus.yml")
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "api:8000" and "api" in services


# Images, and who runs them.


def stages(dockerfile: Path) -> list[str]:
    """The text of each stage of a Dockerfile, without comments."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    return re.split(r"^FROM .*$", "\n".join(lines), flags=re.M)[1:]


def test_the_context_of_a_build_holds_the_sources_and_nothing_else(tmp_path: Path) -> None:
    wanted = {
        "pyproject.toml", "clipstack/cli.py", "serve/static/page.js", "configs/demo.toml",
        "docker/requirements.py",
    }  # fmt: skip
    unwanted = {
        ".git/config", ".venv/bin/python", "tests/conftest.py", "runs/demo/recipe.toml", "docs/deploy.md",
        "secret.env", "clipstack/__pycache__/cli.pyc", "docker/compose.yaml", "data/x.tar", ".ci/run",
        "benchmarks/serve.py",
    }  # fmt: skip
    for name in wanted | unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    patterns = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    context = {name for name in exclude_paths(str(tmp_path), patterns) if (tmp_path / name).is_file()}
    assert context == wanted


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_everything_that_a_dockerfile_copies_is_in_the_context(dockerfile: Path) -> None:
    patterns = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    included = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile.read_text(), re.M):
        for source in line.split()[:-1]:
            assert source in included and (REPOSITORY / source).exists(), source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_last_stage_runs_as_a_user_without_rights(dockerfile: Path) -> None:
    last = stages(dockerfile)[-1]
    assert re.findall(r"^USER (.*)$", last, re.M) == ["10001:10001"]  # a number: runAsNonRoot can check it


def test_every_setting_in_an_image_is_one() -> None:
    texts = [(DOCKER / name).read_text() for name in ("serve.Dockerfile", "compose.yaml", "kubernetes.yaml")]
    names = re.findall(rf"{ENV_PREFIX}([A-Z_]+)", "\n".join(texts))
    assert len(names) >= 9 and {name.lower() for name in names} <= Settings.model_fields.keys()


def test_requirements_are_those_of_the_extras() -> None:
    script = [sys.executable, str(DOCKER / "requirements.py")]
    serve, train = (
        set(subprocess.run([*script, extra], capture_output=True, text=True, check=True).stdout.splitlines())
        for extra in ("serve", "train")
    )
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*extras["model"], *extras["serve"]} - {"clipstack[model]"} < serve
    assert not {name for name in serve if name.startswith(("deepspeed", "webdataset", "pytest"))}
    assert not {name for name in serve | train if name.startswith("clipstack")}
    assert {name for name in train if name.startswith("deepspeed")}


def test_compose_gives_the_server_its_grace_and_no_rights() -> None:
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys(), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to everybody"
    api = compose()["services"]["api"]
    assert api["read_only"] and api["volumes"][0].endswith(":/models:ro")
    assert int(api["stop_grace_period"].rstrip("s")) > Settings().grace_s + Settings().drain_delay_s


def test_compose_names_only_volumes_that_it_has() -> None:
    table = compose()
    for service in table["services"].values():
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", mount).split(":")[0]
            assert source.startswith("./") or source in table["volumes"], mount


def test_the_demo_s_profile_trains_before_the_api_starts() -> None:
    services = compose()["services"]
    assert services["train-demo"]["profiles"] == ["demo"]
    waits = services["api"]["depends_on"]["train-demo"]
    assert waits == {"condition": "service_completed_successfully", "required": False}
    trained = services["train-demo"]["command"][-1]
    served = services["api"]["command"][-1].replace("${CLIPSTACK_MODEL:-demo}", "demo")
    assert trained == served == "/models/demo"


def test_kubernetes_parts_fit_together() -> None:
    deployment, service = kubernetes("Deployment")["spec"], kubernetes("Service")["spec"]
    pod = deployment["template"]
    labels = pod["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == service["selector"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in pod["spec"]["volumes"]
    }
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    target = kubernetes("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == kubernetes("Deployment")["metadata"]["name"]
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == kubernetes("PersistentVolumeClaim")["metadata"]["name"]


def test_kubernetes_waits_longer_than_the_server_needs() -> None:
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    (pause_s,) = map(float, re.findall(r"sleep\((\d+)\)", str(pod["containers"][0]["lifecycle"]["preStop"])))
    needed_s = pause_s + Settings().drain_delay_s + Settings().grace_s
    assert pod["terminationGracePeriodSeconds"] > needed_s


def test_every_probe_is_answered_without_a_token(tmp_path: Path) -> None:
    (container,) = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]
    probes = [container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")]
    probes += re.findall(r"'(/\w+)'", (DOCKER / "serve.Dockerfile").read_text())
    assert len(probes) == 4
    settings = Settings.model_validate(
        {"models": ("demo=unused",), "label_set_file": tmp_path / "sets", "token_hashes": ("0" * 64,)}
    )
    with TestClient(create_app(settings, FakeRuntime())) as client:
        assert client.get("/v1/models").status_code == 401
        assert [client.get(path).status_code for path in probes] == [200] * 4


def test_yaml_blocks_of_the_guide_parse() -> None:
    blocks = [block for block in read_blocks("docs/deploy.md") if block.language == "yaml"]
    assert all(list(yaml.safe_load_all(block.text)) for block in blocks)
