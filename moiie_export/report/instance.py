"""Instance routing: what the instruction decided for each case, vision experts and adapters (spec mome.md, 1.2 and 1.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from moiie_export.report.document import Document
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import counted, percent
from moiie_export.report.section import Section
from moiie_export.report.svg import CHARACTER, WIDTH, Drawing, legend_lines
from moiie_export.report.table import figure, figures, table

Decided = list[tuple[str, Mapping[str, Any]]]
_ROW, _BAR, _NAME = 44.0, 18.0, 16.0


def section(document: Document) -> Section | None:
    """Chart and tables; None for a family whose tokens are routed one by one."""
    decided: Decided = [(case["name"], case["instance"]) for case in document.cases if "instance" in case]
    if not decided:
        return None
    lead = tag(
        "p",
        "One decision a request: the instruction weighs the vision experts and picks an adapter in every layer. An "
        "expert's contribution is the share of its weighted features in the mean absolute value of all; experts' features "
        "differ in scale, so the weights alone do not tell it.",
        class_="lead",
    )
    pictured = [(name, found) for name, found in decided if "contributions" in found]
    drawn = [figure(_draw(pictured), _caption(pictured), _weights(pictured))] if pictured else []
    return Section("instance", "Instance routing", join([lead, figures(drawn), _adapters(decided)]))


def _caption(pictured: Decided) -> Markup:
    name, found = max(pictured, key=lambda each: max(each[1]["contributions"]))
    share = max(found["contributions"])
    expert = found["experts"][found["contributions"].index(share)]
    return join([tag("strong", "contributions"), f": the largest is {expert}'s, {percent(share)} in {name!r}"])


def _draw(pictured: Decided) -> Drawing:
    experts = pictured[0][1]["experts"]
    legend = [("bar", f"group g{index}", expert) for index, expert in enumerate(experts)]
    top = 16.0 * legend_lines(legend, 0, WIDTH) + 14
    said = "; ".join(
        f"{name}: " + ", ".join(f"{e} {percent(s)}" for e, s in zip(experts, found["contributions"], strict=True))
        for name, found in pictured
    )
    size = (WIDTH, top + _ROW * len(pictured) + 4)
    drawing = Drawing("instance", "What each vision expert contributes, by case", said, size)
    drawing.legend(legend, 0, 8)
    for row, (name, found) in enumerate(pictured):
        y, x = top + row * _ROW, 0.0
        drawing.text(0, y + _NAME / 2, name, "label", "start")
        for index, share in enumerate(found["contributions"]):
            width = WIDTH * share
            note = f"{name}, {experts[index]}: {percent(share)}"
            drawing.rect((x, y + _NAME), (max(width - 1, 0.1), _BAR), f"group g{index}", note)
            if width > CHARACTER * len(percent(share)) + 4:
                drawing.text(x + (width - 1) / 2, y + _NAME + _BAR / 2, percent(share), f"on g{index}", "middle")
            x += width
    return drawing


def _weights(pictured: Decided) -> Markup:
    experts = pictured[0][1]["experts"]
    columns = ["case", *(f"weight of {each}" for each in experts), *(f"contribution of {each}" for each in experts)]
    rows = [[name, *found["move_weights"], *found["contributions"]] for name, found in pictured]
    return table("vision experts by case, in PyTorch", columns, rows)


def _adapters(decided: Decided) -> Markup:
    rows = [
        [
            name,
            " ".join(str(index) for index in found["mole_index"]),
            min(found["mole_margins"], default=None),
            counted(found["ties"], "tie"),
        ]
        for name, found in decided
    ]
    columns = ["case", "adapter of each layer, first layer to the left", "smallest lead", "settled as the bundle did"]
    return table("adapters by case; the lead is the gap of router probability to the next adapter", columns, rows)
