"""The style sheet: legible in light and dark, told apart by those who see fewer colours, and nothing undefined."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

import moiie_export.report
from moiie_export.report import render
from moiie_export.report.balance import COLOURS
from moiie_export.report.heat_map import LEVELS
from moiie_export.report.layers import SYMBOLS
from tests.moiie_export.report.documents import document

CSS = (Path(moiie_export.report.__file__).parent / "style.css").read_text(encoding="utf-8")
TEXT = [
    ("text", "page"), ("text", "card"), ("text", "shade"), ("muted", "page"), ("muted", "card"), ("muted", "shade"),
    ("link", "card"), ("link", "page"), ("bound", "card"), ("bound", "shade"), ("muted", "failing"), ("on-fail", "card"),
    *((f"on-{each}", each) for each in ("ok", "near", "fail", "skipped")),
    *((f"on-g{index}", f"g{index}") for index in range(COLOURS)),
    *((f"t{level}", f"h{level}") for level in range(LEVELS)),
]  # fmt: skip
SHAPES = [f"s{index}" for index in range(len(SYMBOLS))] + [f"g{index}" for index in range(COLOURS)]


def variables(scheme: str) -> dict[str, str]:
    light, dark = CSS.split("@media (prefers-color-scheme: dark) {")
    block = light.split("}")[0] if scheme == "light" else dark.split("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def linear(colour: str) -> list[float]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def contrast(first: str, second: str) -> float:
    """As WCAG defines it: 1 for the same, 21 for black on white."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def without_red_green(colour: str) -> tuple[float, float]:
    """(lightness, yellow against blue): about what is left to someone who does not see red and green apart."""
    red, green, blue = linear(colour)
    yellow = 0.5 * (red + green)
    return luminance(colour) ** (1 / 3), yellow ** (1 / 3) - blue ** (1 / 3)


@pytest.fixture(params=["light", "dark"])
def colours(request: pytest.FixtureRequest) -> dict[str, str]:
    return variables(request.param)


@pytest.mark.parametrize(("text", "ground"), TEXT)
def test_text_is_legible(colours: dict[str, str], text: str, ground: str) -> None:
    assert contrast(colours[text], colours[ground]) >= 4.5


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stand_out(colours: dict[str, str], shape: str) -> None:
    """At least 3 for what is told by its shape; what has a label and a number beside it may be fainter."""
    assert contrast(colours[shape], colours["card"]) >= (3 if shape[0] == "s" else 2)


def test_groups_differ_without_red_and_green(colours: dict[str, str]) -> None:
    for first, second in combinations((f"g{index}" for index in range(COLOURS)), 2):
        one, other = (without_red_green(colours[name]) for name in (first, second))
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.15, (first, second)


def test_the_heat_scale_rises_evenly_enough(colours: dict[str, str]) -> None:
    scale = [luminance(colours[f"h{level}"]) for level in range(LEVELS)]
    rising = sorted(scale, reverse=luminance(colours["card"]) > 0.5)
    assert scale == rising
    assert all(contrast(colours[f"h{a}"], colours[f"h{a + 1}"]) > 1.1 for a in range(LEVELS - 1))


def test_both_schemes_define_what_is_used() -> None:
    light, dark = variables("light"), variables("dark")
    assert light.keys() == dark.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", CSS)) <= light.keys()


def test_every_class_of_a_drawing_is_styled() -> None:
    pages = [render(document(wrong=1, experts=8)), render(document())]
    drawn = "".join(re.findall(r"<svg.*?</svg>", "".join(pages), re.DOTALL))
    used = {name for found in re.findall(r'class="([^"]*)"', drawn) for name in found.split()}
    assert used >= {"cell", "changed", "closed", "differs", "failing", "shade", "bound"}
    assert not {name for name in used - {"series"} if f".{name}" not in CSS}
