"""The documentation builds as a site, without a warning, and the site asks nothing of other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_built(site: Path) -> None:
    pages = {str(path.relative_to(DOCS).with_suffix(".html")) for path in DOCS.rglob("*.md")}
    assert pages <= {str(path.relative_to(site)) for path in site.rglob("*.html")}


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loading = re.compile(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=[\"']?https?://[^>]*>")
    for page in site.rglob("*.html"):
        tags = [tag for tag in loading.findall(page.read_text()) if "canonical" not in tag]
        assert tags == [], page


@pytest.mark.parametrize(
    ("index", "folder"), [("decisions/index.md", "decisions"), ("benchmarks.md", "benchmarks")]
)
def test_the_lists_of_pages_are_complete(index: str, folder: str) -> None:
    path = DOCS / index
    linked = {
        (path.parent / target).resolve() for target in re.findall(r"\]\(([\w./-]+)\)", path.read_text())
    }
    assert {page.resolve() for page in (DOCS / folder).glob("*.md")} - {path.resolve()} <= linked
