"""The page at / and the reference at /docs in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.app import create_app
from serve.security import hash_token
from serve.settings import Settings
from tests.serve.browser import Browser, chromium
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server
from tests.serve.pictures import jpeg


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "gallery").mkdir()
    for number in range(5):
        (folder / "gallery" / f"picture-{number}.jpg").write_bytes(jpeg(number))
    settings = Settings(
        models=("fake=unused",),  # type: ignore[arg-type]
        label_set_file=folder / "sets.sqlite3",
        gallery=folder / "gallery",
    )
    with live_server(create_app(settings, FakeRuntime())) as base:
        yield base


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.jpg"
    path.write_bytes(jpeg(3, width=320, height=240))
    return path


def rows(browser: Browser) -> list[str]:
    found = browser.evaluate(
        "[...document.querySelectorAll('#results .name')].map((name) => name.textContent)"
    )
    return list(found)


def test_an_image_and_labels_give_bars(browser: Browser, url: str, image: Path) -> None:
    browser.faults.clear()
    browser.requests.clear()
    browser.open(url)
    browser.wait_for("document.querySelector('#facts').textContent.includes('16 dimensions')")
    assert browser.evaluate("document.querySelector('#go').disabled") is True
    browser.choose_file("#file", image)
    browser.wait_for("document.querySelectorAll('#results li').length === 5")
    browser.evaluate(
        "document.querySelector('#labels').value = 'red, green\\nblue, red';"
        "document.querySelector('#labels').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    browser.wait_for("document.querySelectorAll('#results li').length === 3")
    assert sorted(rows(browser)) == ["blue", "green", "red"]
    widths = "[...document.querySelectorAll('#results .track div')].map((bar) => parseFloat(bar.style.width))"
    values = browser.evaluate(widths)
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(100, abs=0.1)
    assert browser.faults == []
    assert all(request.startswith((url, "blob:", "data:")) for request in browser.requests), browser.requests


def test_keys_alone_are_enough(browser: Browser, url: str, image: Path) -> None:
    browser.open(url)
    browser.wait_for("document.querySelector('#facts').textContent !== ''")
    browser.choose_file("#file", image)
    browser.wait_for("document.querySelectorAll('#results li').length === 5")
    browser.evaluate(
        "document.querySelector('#results').replaceChildren(); document.querySelector('#labels').focus()"
    )
    seen = []
    for _ in range(3):
        browser.press("Tab")
        seen.append(browser.evaluate("document.activeElement.id"))
    assert seen == ["templates", "multi", "go"]
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('#results li').length === 5")


def test_a_text_finds_pictures_of_the_gallery(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait_for("!document.querySelector('#gallery-card').hidden")
    browser.evaluate(
        "document.querySelector('#query').value = 'red'; document.querySelector('#search').requestSubmit()"
    )
    browser.wait_for("document.querySelectorAll('#gallery img').length === 5")
    browser.wait_for("[...document.querySelectorAll('#gallery img')].every((img) => img.naturalWidth > 0)")


def test_a_server_with_tokens_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    settings = Settings(
        models=("fake=unused",),  # type: ignore[arg-type]
        label_set_file=tmp_path / "sets.sqlite3",
        token_hashes=(hash_token("sk-page"),),
    )
    with live_server(create_app(settings, FakeRuntime())) as guarded:
        browser.open(guarded)
        browser.wait_for("!document.querySelector('#token-card').hidden")
        browser.evaluate(
            "document.querySelector('#token').value = 'sk-page';"
            "document.querySelector('#token-form').requestSubmit()"
        )
        browser.wait_for("document.querySelector('#token-card').hidden")
        browser.wait_for("document.querySelector('#facts').textContent !== ''")


def test_the_reference_shows_every_operation_and_nothing_from_elsewhere(browser: Browser, url: str) -> None:
    browser.faults.clear()
    browser.requests.clear()
    browser.open(url + "/docs")
    browser.wait_for("document.querySelectorAll('details').length >= 14")
    assert "/v1/embeddings" in browser.evaluate("document.body.textContent")
    assert browser.faults == []
    assert all(request.startswith(url) for request in browser.requests)


@pytest.mark.parametrize(("width", "phone"), [(1200, False), (375, True)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_text_is_readable(
    browser: Browser, url: str, image: Path, tmp_path: Path, width: int, phone: bool, scheme: str
) -> None:
    browser.look(width=width, height=800, scheme=scheme, phone=phone)
    browser.open(url)
    browser.choose_file("#file", image)
    browser.wait_for("document.querySelectorAll('#results li').length === 5")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#results .name", "#results .value", ".message", ".facts", "#go", "footer"):
        assert contrast(browser, selector) >= 4.5, (selector, scheme)
    browser.screenshot(tmp_path / f"page-{scheme}-{width}.png")
    assert (tmp_path / f"page-{scheme}-{width}.png").stat().st_size > 10_000


CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c +
  0.055) / 1.055) ** 2.4) .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(SELECTOR);
  let behind = element;
  while (parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const pair = [light(parse(getComputedStyle(element).color)),
  light(parse(getComputedStyle(behind).backgroundColor))].sort((a, b) => b - a); return (pair[0] + 0.05) /
  (pair[1] + 0.05);
})()"""


def contrast(browser: Browser, selector: str) -> float:
    """WCAG's contrast ratio of an element's text to what lies behind it."""
    return float(browser.evaluate(CONTRAST.replace("SELECTOR", repr(selector))))
