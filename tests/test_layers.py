"""Who may import whom: read from the sources, so that a wrong import fails here and not in a user's small
install."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clipstack", "serve", "data_pipelines")

# From low to high: a module imports only from layers below it, or from its own layer.
LAYERS = (
    {"errors", "files", "objective_config", "torchvision_compat", "stopping", "telemetry"},
    {"config", "world"},
    {"losses", "model", "preprocess", "templates", "dropout", "guard"},
    {"accumulation", "average", "flops", "saver"}
    | {"checkpoint", "loader", "engine", "zero_shot", "retrieval", "reporting", "features", "eval_data"},
    {
        "trainer",
        "evaluate",
        "run_folder",
        "dry_run",
        "demo_probes",
        "embed",
        "eval_page",
        "cards",
        "onnx_export",
        "demo_page",
    },
    {"train", "cli", "demo", "doctor", "export_cli", "compare", "runs"},
)
SERVE_MAY_USE = {"checkpoint", "model", "preprocess", "zero_shot", "errors", "templates"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, anywhere in it, outside `if TYPE_CHECKING`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def names_in(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def layer_of(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    raise AssertionError(f"clipstack/{module}: give it a layer in {Path(__file__).name}")


@pytest.mark.parametrize("path", modules("data_pipelines"), ids=lambda p: p.name)
def test_data_pipelines_imports_neither_clipstack_nor_serve_nor_torch(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & {"clipstack", "serve", "torch", "deepspeed", "open_clip"}


@pytest.mark.parametrize("path", modules("serve"), ids=lambda p: p.name)
def test_serve_imports_no_training(path: Path) -> None:
    names = imports_of(path)
    assert not {name.split(".")[0] for name in names} & {"deepspeed", "webdataset", "data_pipelines"}
    used = {name.split(".")[1] for name in names if name.startswith("clipstack.")} - {"__version__"}
    assert used <= SERVE_MAY_USE


@pytest.mark.parametrize("path", modules("clipstack"), ids=lambda p: str(p.relative_to(ROOT)))
def test_clipstack_imports_downward(path: Path) -> None:
    module = path.relative_to(ROOT / "clipstack").parts[0].removesuffix(".py")
    if module == "__init__":
        return
    for name in imports_of(path):
        if name.startswith("clipstack."):
            other = name.split(".")[1]
            if (ROOT / "clipstack" / f"{other}.py").exists() or (ROOT / "clipstack" / other).is_dir():
                assert layer_of(other) <= layer_of(module), f"{module} imports {other}, which lies above it"
        assert not name.startswith("serve."), "clipstack.cli reaches serve by name alone"


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_engine_imports_deepspeed(package: str) -> None:
    users = [
        path.name for path in modules(package) if "deepspeed" in {n.split(".")[0] for n in imports_of(path)}
    ]
    assert users == (["engine.py"] if package == "clipstack" else [])


@pytest.mark.parametrize("module", ["config", "errors", "objective_config", "cli", "train"])
def test_light_modules_import_no_torch(module: str) -> None:
    tree = ast.parse((ROOT / "clipstack" / f"{module}.py").read_text(encoding="utf-8"))
    tops = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in names_in(node)
    }
    assert not tops & {"torch", "open_clip", "deepspeed"}
