"""The page in headless Chromium: on a phone and on a desk, in light and dark.

Skipped where no Chromium is found (CHROME_BIN, the PATH, Playwright's cache); on Debian: apt install chromium-headless-shell.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moiie_export.report import write_report
from tests.moiie_export.report.chromium import Browser, Scheme, browser, find_chromium
from tests.moiie_export.report.documents import Sizes, document

LONG = "a_name_without_any_space_" * 6
DOCUMENTS = {
    "passed": Sizes(),
    "failed": Sizes(wrong=1, name=LONG, text=LONG + " b c d e " + LONG),
    "large": Sizes(layers=16, sparse=tuple(range(1, 16, 2)), experts=24, wrong=9, quantised=True),
    "dense": Sizes(sparse=()),
}
SCREENS: list[tuple[int, Scheme]] = list(product((360, 1280), ("light", "dark")))  # type: ignore[arg-type]
CHARTS = """[...document.querySelectorAll('svg')].map(svg => {
  const frame = svg.getBoundingClientRect(), box = svg.parentElement.getBoundingClientRect();
  return {width: frame.width, natural: svg.viewBox.baseVal.width, height: frame.height,
          inside: box.left >= 0 && box.right <= innerWidth, shapes: svg.querySelectorAll('rect, path').length};
})"""
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const outside = texts.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1).map(([text]) => 'outside: ' + text);
  const crossing = texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4
  ).map(([other]) => one + ' over ' + other));
  return [...outside, ...crossing];
})"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium: set CHROME_BIN, or on Debian `apt install chromium-headless-shell`")
    with browser(found, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module", params=DOCUMENTS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on disk."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(document(DOCUMENTS[request.param]), path)
    return path


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_fits_the_screen_and_asks_for_nothing(chromium: Browser, page: Path, width: int, scheme: Scheme) -> None:
    chromium.open(page, width, scheme)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert chromium.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    charts: list[dict[str, Any]] = chromium.evaluate(CHARTS)
    assert charts
    for chart in charts:
        assert chart["inside"]
        assert chart["width"] >= chart["natural"] - 0.5, "labels would be too small"
        assert chart["height"] > 40
        assert chart["shapes"] > 3
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]


@pytest.mark.parametrize("width", [360, 1280])
def test_labels_lie_inside_their_chart_and_apart(chromium: Browser, page: Path, width: int) -> None:
    chromium.open(page, width)
    assert chromium.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("width", [360, 1280])
def test_opened_tables_scroll_by_themselves(chromium: Browser, page: Path, width: int) -> None:
    chromium.open(page, width)
    assert chromium.evaluate("document.querySelectorAll('details').forEach(each => each.open = true), 1") == 1
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_light_and_dark_are_drawn_so(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(document(), page)
    brightness = {}
    for scheme in ("light", "dark"):
        chromium.open(page, 360, scheme)
        chromium.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert shot.width == 360
            assert len(shot.convert("RGB").getcolors(shot.width * shot.height) or []) > 20
            [brightness[scheme]] = shot.convert("L").resize((1, 1)).tobytes()
    assert brightness["dark"] < 70 < 190 < brightness["light"]


def test_the_browser_would_tell(chromium: Browser, tmp_path: Path) -> None:
    """That what the other tests look for would be seen."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<div style='width: 3000px'>x</div><script>console.error('bad'); fetch('http://127.0.0.1:9/')</script>"
        "<svg viewBox='0 0 50 20' width='50'><text x='0' y='10'>abc</text><text x='2' y='11'>de</text></svg>",
        encoding="utf-8",
    )
    chromium.open(path, 1280)
    assert chromium.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert any("bad" in each for each in chromium.complaints())
    assert any("127.0.0.1" in each for each in chromium.requests())
    assert "abc over de" in chromium.evaluate(OVERLAPS)
