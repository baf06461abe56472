"""docs/tree.md says in one line what each file owns; the line is the first sentence of the file itself.

`python tests/test_tree.py` writes it anew.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *(
        face.parent.relative_to(ROOT).as_posix()
        for top in ("clipstack", "data_pipelines", "serve")
        for face in sorted((ROOT / top).rglob("__init__.py"))
    ),
    *("benchmarks", "docker", "examples"),
)


def first_sentence(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph)[0]


def tree() -> str:
    lines = ["# The tree", "", "One line a file: the first sentence of the file itself.", ""]
    for package in PACKAGES:
        lines += [f"## {package}/", ""]
        face = ROOT / package / "__init__.py"
        if face.exists():
            lines += [first_sentence(face), ""]
        for path in sorted((ROOT / package).glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"- `{path.name}`: {first_sentence(path)}")
        lines.append("")
    return "\n".join(lines)


def test_every_module_opens_with_a_sentence() -> None:
    silent = [
        path for package in PACKAGES for path in (ROOT / package).glob("*.py") if not first_sentence(path)
    ]
    assert silent == []


def test_the_tree_in_the_docs_is_true() -> None:
    assert (ROOT / "docs/tree.md").read_text(encoding="utf-8") == tree(), "run python tests/test_tree.py"


def test_the_tree_in_the_readme_names_what_exists() -> None:
    (text,) = re.findall(
        r"^## The tree\n\n```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    folder, named = Path(), []
    for line in text.splitlines():
        path = Path(line.split()[0])
        folder = folder if line.startswith(" ") else path
        named.append(folder / path if line.startswith(" ") else path)
    assert len(named) > 15
    assert [str(path) for path in named if not (ROOT / path).exists()] == []


if __name__ == "__main__":
    (ROOT / "docs/tree.md").write_text(tree(), encoding="utf-8")
