"""Every command block of README and docs runs in a test, or says why none can run it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from data_pipelines.index import Sample, write_shard
from tests.clipstack.training_runs import png
from tests.data_pipelines.making import image_folder, jpeg
from tests.docs.pages import COMMANDS, REPOSITORY, read_blocks, run_page
from tests.serve.models import save_model, tiny_model

OTHER_LANGUAGES = {"text", "toml", "json", "yaml", "promql", "dockerfile", "nginx", "ini"}
# Measurements: their commands take minutes to hours, on machines and beside programs that the page names.
EXEMPT = "docs/benchmarks/"
RUN_BY = {
    "README.md": "tests/docs/test_pages.py",
    "docs/api.md": "tests/docs/test_pages.py",
    "docs/data.md": "tests/docs/test_pages.py",
    "docs/install.md": "tests/docs/test_pages.py",
    "docs/objectives.md": "tests/docs/test_pages.py",
    "docs/training.md": "tests/docs/test_pages.py",
    "docs/evaluation.md": "tests/clipstack/evaluation/test_docs.py",
    "docs/serving.md": "tests/serve/test_docs.py",
}
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/**/*.md"),
        REPOSITORY / "benchmarks/README.md",
    ]
    if not str(path.relative_to(REPOSITORY)).startswith(EXEMPT)
)


@pytest.mark.parametrize("page", PAGES)
def test_each_command_block_says_whether_it_runs(page: str) -> None:
    blocks = read_blocks(page)
    fences = re.findall(r"^\s*```", (REPOSITORY / page).read_text(), re.M)
    assert len(fences) == 2 * len(blocks), f"{page}: a block is indented or not closed"
    for block in blocks:
        if block.language in COMMANDS:
            known = block.mark in ("run", "serve") or (block.mark == "not run" and block.why)
            assert known, f"{block}: put <!-- run --> or <!-- not run: WHY --> before it"
        else:
            assert block.language in OTHER_LANGUAGES, f"{block}: name the block's language"


def test_each_page_with_commands_is_run_by_a_test() -> None:
    with_commands = {p for p in PAGES if any(block.mark in ("run", "serve") for block in read_blocks(p))}
    assert with_commands == RUN_BY.keys()
    for page, test in RUN_BY.items():
        assert f'run_page("{page}"' in (REPOSITORY / test).read_text(), f"{test} does not run {page}"


def test_a_block_that_fails_fails_the_page(tmp_path: Path) -> None:
    # Absolute, so that it is found outside the repository too.
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n<!-- run -->\n```bash\necho before\nfalse\necho after\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:4: exit code 1\nbefore\n$"):
        run_page(str(page), tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_toml_block_is_toml(page: str) -> None:
    for block in read_blocks(page):
        if block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    path = REPOSITORY / page
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


ROW_OF_FIGURES = r"^\|[^|]*\|(?:[^|]*\|)?([^|]*)\| \[\w+\]\(((?:docs/)?benchmarks/\w+\.md)\)[^|]*\|$"


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_figures_stand_on_the_page_that_they_link_to(page: str) -> None:
    path = REPOSITORY / page
    rows = re.findall(ROW_OF_FIGURES, path.read_text(encoding="utf-8"), re.M)
    assert len(rows) > 5
    for told, target in rows:
        measured = (path.parent / target).read_text(encoding="utf-8")
        assert [figure for figure in re.findall(r"\d+\.\d+", told) if figure not in measured] == [], target


def test_the_readme(tmp_path: Path) -> None:
    image_folder(tmp_path / "photos", 12)
    image_folder(tmp_path / "photos-val", 6)
    (tmp_path / "photo.jpg").write_bytes(jpeg(0))
    run_page("README.md", tmp_path)


def make_shards(folder: Path, count: int) -> None:
    """One sample in each."""
    folder.mkdir()
    for i in range(count):
        sample = Sample(f"{i:04}", {"png": png(i), "txt": f"thing {i}".encode()})
        write_shard(folder / f"{i:05}.tar", [sample])


@pytest.mark.slow
def test_the_guide_to_data(tmp_path: Path) -> None:
    run_page("docs/data.md", tmp_path)


def test_the_guide_to_objectives(tmp_path: Path) -> None:
    run_page("docs/objectives.md", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_guide_to_training(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", 100)
    run_page("docs/training.md", tmp_path)


@pytest.mark.slow
def test_the_page_on_installing(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", 8)
    run_page("docs/install.md", tmp_path)


def test_the_page_on_python(tmp_path: Path) -> None:
    save_model(tmp_path / "runs/mine", tiny_model())
    (tmp_path / "photo.jpg").write_bytes(jpeg(0))
    run_page("docs/api.md", tmp_path)
