"""The page: complete, valid, alone, escaped, and readable without seeing it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from moiie_export.report import render
from moiie_export.report.numbers import power, short
from moiie_export.report.page import SECTIONS
from moiie_runtime.errors import MoiieError
from tests.moiie_export.report.documents import Sizes, document
from tests.moiie_export.report.pages import Element, read

ALL = [
    "Verdict", "Error by layer", "Routing", "Load balance", "Router margins", "Logits along the sequence", "Answers",
    "Not compared", "How to read this",
]  # fmt: skip
SIZES = {
    "passed": Sizes(),
    "failed": Sizes(wrong=1),
    "dense": Sizes(sparse=()),
    "modality alone decides": Sizes(routed=False),
    "one layer": Sizes(layers=1, sparse=(0,)),
    "large": Sizes(layers=16, sparse=tuple(range(1, 16, 2)), experts=32, wrong=7),
    "three modalities": Sizes(groups={"language": (0, 1), "vision": (1, 2), "audio": (2, 3)}),
}


@pytest.fixture(scope="module", params=SIZES)
def made(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Element, str]:
    """(document, page as elements, page as text) of each size."""
    found = document(SIZES[request.param])
    page = render(found)
    return found, read(page), page


def headings(page: Element) -> list[str]:
    return [heading.text for heading in page.all("h2")]


def numbers(value: Any, key: str = "") -> Iterator[int | float]:
    """Every number of a document, those that only place a stretch of the sequence left out."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from numbers(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each, key)
    elif (
        isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("vision_spans", "image_tokens")
    ):
        yield value


def test_tags_are_balanced_and_ids_unique(made: tuple[dict[str, Any], Element, str]) -> None:
    _, page, text = made
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = [each for found in re.findall(r' aria-labelledby="([^"]*)"', text) for each in found.split()]
    assert set(used) <= set(ids)
    assert {link.attributes["href"].removeprefix("#") for link in page.all("a")} <= set(ids)
    assert [len(page.all(name)) for name in ("html", "head", "body", "main", "h1", "header")] == [1] * 6


def test_it_is_alone(made: tuple[dict[str, Any], Element, str]) -> None:
    _, page, text = made
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:|data:", text)
    assert not any(page.all(name) for name in ("script", "link", "img", "iframe", "object", "embed", "base"))
    assert not re.search(r"<[^>]* (src|on[a-z]+)=", text)
    assert "default-src 'none'" in text, "and would be stopped if it tried"


def test_every_number_is_there_without_the_charts(made: tuple[dict[str, Any], Element, str]) -> None:
    found = dict(made[0])
    page = read(re.sub(r"<svg.*?</svg>", "", made[2], flags=re.DOTALL))
    said = set(re.split(r"[^\w.+-]+", page.text))
    edges = found.pop("margin_edges")
    missing = {short(number) for number in numbers(found)} - said
    assert not missing
    if found["model"]["moe"] and found["model"]["moe"]["routed"]:
        assert {power(edge) for edge in edges} <= said


def test_every_chart_is_told_in_words_and_as_a_table(made: tuple[dict[str, Any], Element, str]) -> None:
    found, page, _ = made
    charts = page.all("svg")
    assert len(charts) >= 4 if found["model"]["moe"] else len(charts) == 4
    for chart in charts:
        title, description = chart.children[:2]
        assert (title.name, description.name) == ("title", "desc")
        assert len(title.text) > 5
        assert len(description.text) > 20
        assert chart.attributes["role"] == "img"
        assert chart.attributes["aria-labelledby"].split() == [title.attributes["id"], description.attributes["id"]]
    for figure in page.all("figure"):
        assert figure.all("figcaption")
        assert figure.all("table") or "what differs" in figure.text, "the table of both sides is at the first of two"


def test_tables_have_captions_and_headings(made: tuple[dict[str, Any], Element, str]) -> None:
    for table in made[1].all("table"):
        assert len(table.all("caption")) == 1
        width = len(table.all("thead")[0].all("th"))
        for row in table.all("tbody")[0].children:
            assert len(row.children) == width
            assert [cell.name for cell in row.children].count("th") == 1


def test_the_headline_says_what_failed_first() -> None:
    page = read(render(document(wrong=1)))
    [header] = page.all("header")
    assert "failed" in header.text
    assert header.all("h1")[0].text.split() == ["is", "not", "the", "model", "of", "its", "checkpoint", "made-up"]
    assert "layer 1, prefill hidden states, case “picture”" in header.text
    assert "error 0.25, bound 0.0002" in header.text
    stages = page.all("ol")[0].all("li")
    assert [stage.text.split()[0] for stage in stages[:2]] == ["files", "names"]
    assert [stage for stage in stages if stage.all("strong")] == [
        stage for stage in stages if stage.text.startswith("hidden states")
    ], "one stage alone is the first"
    [marked] = [row for row in page.all("tr") if "failed first" in row.text]
    assert "prefill hidden states" in marked.text
    passed = read(render(document()))
    assert "failed first" not in passed.text
    assert "passed" in passed.all("header")[0].text
    assert not [element for element in passed.all("div") if element.attributes.get("class") == "first"]


def test_a_layer_that_fails_later_is_named_too() -> None:
    found = document(wrong=2)
    found["checks"][0].update(passed=False, status="FAIL", value=1, note="tokenizer.json is missing")
    header = read(render(found)).all("header")[0].text
    assert "tokenizer.json is missing" in header
    assert "layer 2, prefill hidden states" in header


def test_sections_are_those_the_document_has_something_for() -> None:
    assert headings(read(render(document()))) == ALL
    routers = {"Routing", "Load balance", "Router margins"}
    assert headings(read(render(document(sparse=())))) == [name for name in ALL if name not in routers]
    assert headings(read(render(document(routed=False)))) == [name for name in ALL if name != "Router margins"]
    damaged = document(wrong=0)
    damaged["checks"] = damaged["checks"][:1]
    for name in ("model", "cases"):
        del damaged[name]
    assert headings(read(render(damaged))) == ["Verdict", "How to read this"]
    assert len(SECTIONS) == len(ALL) + 2, "and those about instances and quantisation"


def test_what_quantisation_costs_is_beside_what_is_accepted() -> None:
    page = read(render(document(quantised=True)))
    assert "Quantisation" in headings(page)
    [part] = [each for each in page.all("section") if each.attributes["id"] == "quantisation"]
    answers, routing = part.all("table")
    assert [cell.text for cell in answers.all("tr")[1].children] == ["picture", "0.125", "98 %"]
    assert [cell.text for cell in routing.all("tr")[0].children] == ["layer", "language", "vision"]
    assert [[cell.text for cell in row.all("td")] for row in routing.all("tr")[1:]] == [["98 %", "95 %"]] * 2
    assert {cell.attributes.get("class") for cell in (*answers.all("td"), *routing.all("td"))} == {"n"}
    words = part.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "int4 and int8 weights" in words
    assert "errors up to 0.4 and the same best token at 85 %" in words
    assert "60 language and 20 vision tokens" in words
    dense = document(sparse=(), quantised=True)
    dense["quantisation"]["routing"] = {"language": {}, "vision": {}}
    [part] = [each for each in read(render(dense)).all("section") if "Accepted" in each.text]
    assert "experts" not in part.text


def test_nothing_compared_is_not_passed() -> None:
    found = document()
    found["checks"] = [check for check in found["checks"] if not check["ran"]]
    header = read(render(found)).all("header")[0].text
    assert "failed" in header
    assert "Nothing was compared" in header


def test_nan_and_zero_have_a_place() -> None:
    found = document(wrong=1)
    for check in found["checks"]:
        if check["stage"] == "hidden states" and check["layer"] == 1:
            check["value"] = "NaN"
        if check["stage"] == "keys":
            check["value"] = 0.0
    found["cases"][0]["prefill"]["logits"]["errors"][3] = "NaN"
    page = read(render(found))
    labels = [{label.text for label in chart.all("text")} for chart in page.all("svg")]
    assert {"NaN", "0"} <= labels[0]
    assert any("NaN" in each for each in labels[-2:])
    assert "nan" not in render(found)


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}\x00\x1b[31m\u202eevil \ud800'


def test_what_others_wrote_is_escaped() -> None:
    found = document(wrong=1, name=HOSTILE, text=HOSTILE + " b c d e f")

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {(HOSTILE if name in ("vision", "keys") else name): spoil(each) for name, each in value.items()}
        return [spoil(each) for each in value] if isinstance(value, list) else value

    found = spoil(found)
    for check in found["checks"]:
        check.update(case=HOSTILE, where=HOSTILE, note=HOSTILE, stage=HOSTILE + check["stage"])
    for case in found["cases"]:
        case["name"] = HOSTILE
    found["checkpoint"] = found["dtype"] = found["model"]["model_type"] = HOSTILE
    text = render(found)
    page = read(text)
    assert not page.all("script")
    assert not page.all("img")
    assert "<script" not in text
    assert "<img" not in text
    assert "49" not in page.all("title")[0].text
    assert not set("\x00\x1b\u202e\ud800") & set(text)
    assert "\\x00\\x1b[31m\\u202eevil \\ud800" in page.all("h1")[0].text
    text.encode("utf-8")


def test_the_same_document_gives_the_same_page_and_is_left_alone() -> None:
    found = document(wrong=1)
    before = copy.deepcopy(found)
    assert render(found) == render(json.loads(json.dumps(found)))
    assert found == before


@pytest.mark.parametrize("data", [{}, {"checks": 3}, {"checks": [{}], "bundle": "b", "checkpoint": "c", "dtype": "d"}])
def test_other_documents_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(MoiieError, match="no document of `moiie parity --json`"):
        render(data)
