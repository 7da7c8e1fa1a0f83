"""The section about decisions that are made once a request."""

from __future__ import annotations

from typing import Any

from moiie_export.report.document import Document
from moiie_export.report.instance import section
from moiie_export.report.page import render
from tests.moiie_export.report.documents import document

INSTANCE: dict[str, Any] = {
    "experts": ["clip", "dino", "<b>pix"],
    "move_weights": [0.25, 0.125, 0.625],
    "contributions": [0.4375, 0.0625, 0.5],
    "mole_index": [3, 0, 2],
    "mole_margins": [0.71875, 0.03125, 0.5],
    "ties": 1,
}


def routed() -> dict[str, Any]:
    """A dense model's document whose cases were routed as a whole; the second has no pictures."""
    made = document(sparse=())
    text_only = {key: value for key, value in INSTANCE.items() if key not in ("experts", "contributions")}
    for case, instance in zip(made["cases"], (INSTANCE, text_only), strict=True):
        case["instance"] = instance
    return made


def test_every_number_is_on_the_page() -> None:
    page = render(routed())
    for text in ("0.25", "0.125", "0.625", "0.438", "0.0625", "44 %", "6 %", "50 %", "3 0 2", "0.0312", "1 tie"):
        assert text in page, text


def test_names_are_escaped() -> None:
    page = render(routed())
    assert "<b>pix" not in page
    assert "&lt;b&gt;pix" in page


def test_a_case_without_pictures_has_adapters_only() -> None:
    made = routed()
    made["cases"] = made["cases"][1:]
    found = section(Document(made))
    assert found is not None
    assert "<svg" not in found.body
    assert "3 0 2" in found.body


def test_other_families_have_no_such_section() -> None:
    assert section(Document(document())) is None
