"""Who may import whom: read from the sources, so that a wrong import fails here and not in a user's small
install."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clipstack", "serve", "data_pipelines")

# The package, from low to high: none of these may import from a layer above its own.
LAYERS = (
    {"errors", "torchvision_compat", "files", "charts", "stopping", "recipes", "run_log", "templates"},
    {"config", "world"},
    {"towers", "model", "losses", "preprocess"},
    {"checkpoint", "loading", "zero_shot", "retrieval"},
    {"evaluation"},
    {"training", "evaluate", "embed", "export", "compare", "runs", "doctor"},
    {"train", "demo", "cli"},
)
SERVE_MAY_USE = {"checkpoint", "model", "preprocess", "zero_shot", "errors", "templates"}
"""Of a folder, its face alone."""


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, anywhere in it but under `if __name__ == ...`."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def names_in(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules("data_pipelines"), ids=lambda p: str(p.relative_to(ROOT)))
def test_data_pipelines_imports_neither_clipstack_nor_serve_nor_torch(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & {"clipstack", "serve", "torch", "deepspeed", "open_clip"}


@pytest.mark.parametrize("path", modules("serve"), ids=lambda p: str(p.relative_to(ROOT)))
def test_serve_imports_no_training(path: Path) -> None:
    names = imports_of(path)
    assert not {name.split(".")[0] for name in names} & {"deepspeed", "webdataset", "data_pipelines"}
    used = {name.split(".")[1] for name in names if name.startswith("clipstack.")} - {"__version__"}
    assert used <= SERVE_MAY_USE
    deep = {name for name in names if name.startswith("clipstack.") and name.count(".") > 1}
    assert not {name for name in deep if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()}


def clipstack_imports() -> dict[str, set[str]]:
    """Each module of clipstack (a folder counts as one) -> those that it imports."""
    graph: dict[str, set[str]] = {}
    for path in modules("clipstack"):
        module = path.relative_to(ROOT / "clipstack").parts[0].removesuffix(".py")
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("clipstack.")}
        graph.setdefault(module, set()).update(used)
    return {
        module: {name for name in used if name in graph and name != module} for module, used in graph.items()
    }


def test_clipstack_has_no_import_cycle() -> None:
    TopologicalSorter(clipstack_imports()).prepare()  # raises CycleError, naming the cycle


def dotted(path: Path) -> str:
    """A file's name as others import it: the face of a package has the package's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def packages_of(name: str) -> set[str]:
    """The packages that a module lies in: to import it runs their faces first."""
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def file_imports(package: str) -> dict[str, set[str]]:
    """Each file -> those that its imports run. Its own packages count only where it imports them by name:
    they are running already."""
    graph = {}
    for path in modules(package):
        name, told = dotted(path), imports_of(path)
        run = set().union(*(packages_of(other) for other in told)) - packages_of(name) - {name}
        graph[name] = told | run
    return {name: used & graph.keys() for name, used in graph.items()}


@pytest.mark.parametrize("package", ["clipstack", "data_pipelines"])
def test_no_files_import_each_other(package: str) -> None:
    TopologicalSorter(file_imports(package)).prepare()


def test_every_module_of_clipstack_has_one_layer() -> None:
    placed = sorted(module for layer in LAYERS for module in layer)
    assert placed == sorted(clipstack_imports().keys() - {"__init__"})


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_clipstack_imports_downward(layer: int) -> None:
    above = set().union(*LAYERS[layer + 1 :])
    graph = clipstack_imports()
    for module in LAYERS[layer]:
        assert not graph[module] & above


@pytest.mark.parametrize("path", modules("clipstack"), ids=lambda p: str(p.relative_to(ROOT)))
def test_clipstack_reaches_serve_by_name_alone(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] == "serve"}


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_engine_imports_deepspeed(package: str) -> None:
    users = [
        path.name for path in modules(package) if "deepspeed" in {n.split(".")[0] for n in imports_of(path)}
    ]
    assert users == (["engine.py"] if package == "clipstack" else [])


@pytest.mark.parametrize(
    "module", ["config/models", "config/reading", "config/objectives", "errors", "cli", "train"]
)
def test_light_modules_import_no_torch(module: str) -> None:
    tree = ast.parse((ROOT / "clipstack" / f"{module}.py").read_text(encoding="utf-8"))
    tops = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in names_in(node)
    }
    assert not tops & {"torch", "open_clip", "deepspeed"}
