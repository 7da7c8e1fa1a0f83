"""Numbers, scales, elements, and what charts are made from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from moiie_export.report.balance import load_balance
from moiie_export.report.document import Document
from moiie_export.report.html import join, tag, visible
from moiie_export.report.layers import layer_errors
from moiie_export.report.logits import logit_tracks
from moiie_export.report.margins import Margins, margins
from moiie_export.report.numbers import counted, listed, percent, power, short
from moiie_export.report.routing import modality_routing
from moiie_export.report.scale import ErrorScale
from moiie_export.report.svg import WIDTH, legend_lines
from tests.moiie_export.report.documents import PROMPT, STEPS, document
from tests.moiie_export.report.pages import read

POSITIVE = st.floats(1e-12, 1e6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (12, "12"), (1234567, "1234567"), (2e-4, "0.0002"), (1.5e-07, "1.5e-7"), (1e-10, "1e-10"),
        (2.5e12, "2.5e12"), (1 / 3, "0.333"), (-1.5, "-1.5"), (None, "–"), (True, "yes"), (math.nan, "NaN"),
        (math.inf, "∞"), (-math.inf, "−∞"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert short(value) == text


@given(POSITIVE)
def test_short_numbers_are_the_number(value: float) -> None:
    assert float(short(value)) == pytest.approx(value, rel=5.1e-3)
    assert float(power(value)) == pytest.approx(value, rel=0.51)


@given(st.floats(0, 1))
def test_a_percentage_is_whole_only_where_the_share_is(share: float) -> None:
    text = percent(share)
    assert abs(float(text.removesuffix(" %")) / 100 - share) <= 0.0051
    assert (text == "100 %") == (share == 1)
    assert (text == "0 %") == (share == 0)


def test_lists_and_counts() -> None:
    assert listed([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert (counted(1, "tie"), counted(2, "tie"), counted(0, "case")) == ("1 tie", "2 ties", "0 cases")


@given(st.lists(POSITIVE | st.just(0.0), min_size=1), st.lists(POSITIVE, max_size=2), st.booleans())
def test_a_scale_keeps_the_order_and_holds_everything(values: list[float], bounds: list[float], nan: bool) -> None:
    scale = ErrorScale.of([*values, *[math.nan] * nan], bounds)
    places = [scale.place(value) for value in sorted([*values, *bounds])]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    positive = [scale.place(value) for value in values if value]
    assert not (scale.zero and positive) or min(positive) > scale.place(0.0)
    assert not nan or max(places) < scale.place(math.nan)
    ticks = scale.ticks()
    assert [place for place, _ in ticks] == sorted(place for place, _ in ticks)
    assert len(ticks) <= 9
    assert all(scale.place(float(label)) == pytest.approx(place) for place, label in ticks if label not in ("NaN", "0"))


@given(st.text(), st.text())
def test_text_stays_text(text: str, value: str) -> None:
    element = read(str(tag("p", text, title=value))).all("p")[0]
    normal = [each.replace("\r\n", "\n").replace("\r", "\n") for each in (visible(text), visible(value))]
    assert [element.text, element.attributes["title"]] == normal
    visible(text).encode("utf-8")


def test_elements() -> None:
    assert tag("td", 3, None, ["a", Markup("<b>")], class_="n", colspan=2, hidden=False, open=True) == (
        '<td class="n" colspan="2" open>3a<b></td>'
    )
    assert tag("line", x1=1.0, y1=2.345) == '<line x1="1" y1="2.35"></line>'
    assert join(["<", Markup("<")]) == "&lt;<"


def test_legends_wrap() -> None:
    entries = [("circle", "", "hidden states")] * 5
    assert legend_lines(entries, 40, WIDTH) == 3
    assert legend_lines(entries[:1], 40, WIDTH) == 1
    assert legend_lines([], 40, WIDTH) == 0


def test_layers_take_the_worst_case_and_name_the_first_failure() -> None:
    found = document(wrong=2)
    prefill, decode = layer_errors(Document(found))
    assert (prefill.phase, decode.phase, prefill.layers) == ("prefill", "decode", [0, 1, 2, 3])
    assert (prefill.failed, prefill.bounds) == ([2, 3], [2e-4])
    values = [case["prefill"]["layers"][0]["errors"]["keys"] for case in found["cases"]]
    assert prefill.series["keys"][0] == max(values)
    assert list(prefill.series["expert weights"]) == [1, 3], "layers without experts have none"
    for check in found["checks"]:
        if (check["case"], check["phase"], check["stage"], check["layer"]) == ("picture", "prefill", "keys", 0):
            check["value"] = "NaN"
    assert math.isnan(layer_errors(Document(found))[0].series["keys"][0]), "NaN is worse than anything"


def test_routing_is_summed_over_cases_and_phases() -> None:
    found = document(wrong=1)
    language, vision = modality_routing(Document(found))
    assert (language.modality, vision.modality) == ("language", "vision")
    parts = [
        layer["routing"]["language"]
        for case in found["cases"]
        for phase in ("prefill", "decode")
        for layer in case[phase]["layers"]
        if layer["layer"] == 3
    ]
    layer = language.layers[3]
    assert layer.tokens == sum(part["tokens"] for part in parts) == 2 * PROMPT - 7 + 2 * STEPS
    assert layer.reference == [sum(column) for column in zip(*(part["reached"] for part in parts), strict=True)]
    assert (layer.agreement, language.layers[1].agreement) == (0.0, 1.0)
    assert (language.wrong_layers, language.same) == ([3], False)
    assert (language.layers[1].allowed, vision.layers[1].allowed) == (
        [False, True, True, True],
        [True, True, True, False],
    )
    assert modality_routing(Document(document(sparse=()))) == []


def test_load_balance() -> None:
    found = document()
    balance = load_balance(Document(found))
    assert balance is not None
    assert balance.kinds == ["vision", "language + vision", "language + vision", "language"]
    colours = [balance.colour(kind) for kind in balance.kinds]
    assert colours == [1, 2, 2, 0], "as the modalities have in other charts"
    counts = balance.layers[1]
    assert sum(counts) == 2 * (2 * PROMPT + 2 * STEPS)
    assert balance.imbalance(1) == pytest.approx(max(counts) / (sum(counts) / 4))
    balance.layers[1] = [0, 10, 10, 20]
    assert balance.idle(1) == [0]
    assert "No token reached expert 0 in layer 1" in balance.description()
    assert load_balance(Document(document(sparse=()))) is None


def test_margins() -> None:
    found = margins(Document(document()))
    assert found is not None
    assert found.total == 2 * 2 * (PROMPT + STEPS), "two cases, two layers"
    assert margins(Document(document(routed=False))) is None
    made = Margins([0.0, 1e-8, 1e-4, 1.0], {"a": [1, 2, 3], "b": [4, 5, 6]}, 1e-4)
    assert (made.below(1e-8), made.below(1e-4)) == (5, 12)
    assert [made.place(margin) for margin in (1e-8, 1e-6, 1e-4, 1.0)] == pytest.approx([1, 1.5, 2, 3])
    assert made.label(1) == "1e-8 – 1e-4"


def test_logits_follow_the_prompt() -> None:
    found = document(wrong=1)
    picture, text = logit_tracks(Document(found))
    assert [point.position for point in picture.points] == list(range(PROMPT + STEPS))
    assert picture.differing == [0, PROMPT]
    assert (picture.vision, text.vision) == ([(5, 12)], [])
    assert "Another best token: at position 0, 24." in picture.description()
