"""Tables, and figures with a drawing and the table behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from moiie_export.report.html import tag
from moiie_export.report.numbers import short
from moiie_export.report.svg import Drawing


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table in a box that scrolls by itself; the first cell of a row is its heading, numbers stand to the right."""
    cells = [list(row) for row in rows]
    numeric = [_is_numeric([row[column] for row in cells]) for column in range(len(columns))]
    head = [tag("th", name, scope="col", class_=_number(right)) for name, right in zip(columns, numeric, strict=True)]
    body = [
        tag("tr", [_cell(value, index, right) for index, (value, right) in enumerate(zip(row, numeric, strict=True))])
        for row in cells
    ]
    inside = (tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body))
    return scrolling(tag("table", inside), caption)


def scrolling(content: Any, label: str) -> Markup:
    """A box that scrolls by itself where its content is too wide; the keyboard can reach it."""
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=label)


def folded(summary: str, *content: Any) -> Markup:
    """Content that opens on demand."""
    return tag("details", tag("summary", summary), content)


def figure(drawing: Drawing, caption: Any, *behind: Any) -> Markup:
    """A drawing, what it shows, and the numbers behind it."""
    numbers = folded("The numbers", *behind) if behind else None
    return tag("figure", tag("figcaption", caption), scrolling(drawing.svg(), f"{drawing.title}, chart"), numbers)


def figures(found: Iterable[Any]) -> Markup:
    """Figures beside each other where there is room."""
    return tag("div", found, class_="figures")


def status_badge(status: str, text: str = "") -> Markup:
    """A status as a word on its colour."""
    return tag("span", text or status, class_=f"badge {STATUS_CLASS.get(status, 'skipped')}")


STATUS_CLASS = {"FAIL": "fail", "near": "near", "not run": "skipped", "ok": "ok"}


def _cell(value: Any, index: int, right: bool) -> Markup:
    shown = value if isinstance(value, (str, Markup)) else short(value)
    if index == 0:
        return tag("th", shown, scope="row", class_=_number(right))
    return tag("td", shown, class_=_number(right))


def _number(right: bool) -> str | None:
    return "n" if right else None


def _is_numeric(column: Sequence[Any]) -> bool:
    """Whether a column holds numbers and nothing else, at least one."""
    found = [value for value in column if value is not None]
    return bool(found) and all(isinstance(value, (int, float)) for value in found)
