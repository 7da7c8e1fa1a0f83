"""Router margins: how near the routers' decisions were, and so how much rounding could change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from moiie_export.report.document import Document
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import Share, counted, power, short
from moiie_export.report.section import Section
from moiie_export.report.svg import WIDTH, Drawing, legend_lines
from moiie_export.report.table import figure, figures, table

_LEFT, _RIGHT, _BAR, _GAP = 84.0, 44.0, 10.0, 6.0


@dataclass(frozen=True)
class Margins:
    """Histogram of margins over all cases, phases and layers.

    Attributes:
        edges: of the bins, ascending.
        counts: modality -> decisions in each bin.
        tie: the margin below which a different choice is a tie.
    """

    edges: list[float]
    counts: dict[str, list[int]]
    tie: float | None

    @property
    def total(self) -> int:
        """All decisions with a margin."""
        return sum(map(sum, self.counts.values()))

    def below(self, edge: float) -> int:
        """Decisions in bins that end at or below a margin."""
        return sum(
            count
            for counts in self.counts.values()
            for stop, count in zip(self.edges[1:], counts, strict=True)
            if stop <= edge * (1 + 1e-9)
        )

    def place(self, margin: float) -> float:
        """Where a margin stands among the bins, counted in bins; logarithmic within one."""
        for index, (start, stop) in enumerate(pairwise(self.edges)):
            if margin <= stop:
                inside = math.log(margin / start) / math.log(stop / start) if 0 < start < margin else margin > start
                return index + inside
        return float(len(self.edges) - 1)

    def label(self, index: int) -> str:
        """A bin's range."""
        return f"{power(self.edges[index])} \N{EN DASH} {power(self.edges[index + 1])}"

    def description(self) -> str:
        """What there is to see, in words."""
        parts = [f"{name}: {counted(sum(counts), 'decision')}" for name, counts in self.counts.items()]
        fullest = max(range(len(self.edges) - 1), key=lambda index: sum(each[index] for each in self.counts.values()))
        near = "" if self.tie is None else f" Below the tie margin of {short(self.tie)}: {self.below(self.tie)}."
        return f"{'; '.join(parts)}. Most lie between {self.label(fullest)}.{near}"


def margins(document: Document) -> Margins | None:
    """The histogram; None where no router decided."""
    counts: dict[str, list[int]] = {}
    for _, _, modality, found in document.routed():
        before = counts.get(modality, [0] * len(found["margins"]))
        counts[modality] = [a + b for a, b in zip(before, found["margins"], strict=True)]
    counts = {modality: each for modality, each in counts.items() if any(each)}
    tie = document.data.get("bounds", {}).get("tie_margin")
    return Margins(list(document.data["margin_edges"]), counts, tie) if counts else None


def section(document: Document) -> Section | None:
    """The chart; None where no router decided."""
    found = margins(document)
    if found is None:
        return None
    lead = tag(
        "p",
        "A decision’s margin is the gap of probability between the last expert that was chosen and the first that was "
        "not. Below the tie margin rounding may decide; such a difference is counted as a tie and followed.",
        class_="lead",
    )
    near = "" if found.tie is None else f", {found.below(found.tie)} below the tie margin of {short(found.tie)}"
    caption = join([tag("strong", counted(found.total, "decision")), near])
    drawn = figure(_draw(found), caption, _totals(found), _table(found, document))
    return Section("margins", "Router margins", join([lead, figures([drawn])]), half=True)


def _draw(found: Margins) -> Drawing:
    names = list(found.counts)
    legend = [("bar", f"group g{index}", name) for index, name in enumerate(names)]
    top = 16.0 * legend_lines(legend, _LEFT, WIDTH) + 12
    row = _BAR * len(names) + _GAP
    drawing = Drawing("margins", "Router margins", found.description(), (WIDTH, top + row * (len(found.edges) - 1) + 4))
    drawing.legend(legend, _LEFT, 8)
    most = max(max(counts) for counts in found.counts.values())
    for index in range(len(found.edges) - 1):
        y = top + row * index
        drawing.text(_LEFT - 6, y + (row - _GAP) / 2, found.label(index), "label", "end")
        for number, name in enumerate(names):
            count = found.counts[name][index]
            length = (WIDTH - _LEFT - _RIGHT) * count / most
            at = y + number * _BAR
            if count:
                drawing.rect((_LEFT, at + 0.5), (max(length, 1.0), _BAR - 1), f"group g{number}")
            drawing.text(_LEFT + length + 4, at + _BAR / 2, str(count), "label small")
    drawing.line((_LEFT, top - 3), (_LEFT, top + row * (len(found.edges) - 1)), "axis")
    if found.tie is not None and found.tie > 0:
        y = top - _GAP / 2 + row * found.place(found.tie)
        drawing.line((4, y), (WIDTH, y), "bound")
        drawing.text(WIDTH, y - 7, f"ties below {short(found.tie)}", "label strong", "end")
    return drawing


def _totals(found: Margins) -> Markup:
    rows: list[list[Any]] = [
        [found.label(index), *(counts[index] for counts in found.counts.values())]
        for index in range(len(found.edges) - 1)
    ]
    rows.append(["all", *(sum(counts) for counts in found.counts.values())])
    rows.append(["share", *(Share(sum(counts) / found.total) for counts in found.counts.values())])
    return table("decisions by margin and modality", ["margin", *found.counts], rows)


def _table(found: Margins, document: Document) -> Markup:
    rows = [
        [phase.case, phase.name, layer, modality, *measured["margins"]]
        for phase, layer, modality, measured in document.routed()
        if any(measured["margins"])
    ]
    bins = [found.label(index) for index in range(len(found.edges) - 1)]
    return table("decisions by margin, case and layer", ["case", "phase", "layer", "modality", *bins], rows)
