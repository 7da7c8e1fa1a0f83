"""Error by layer: of every phase the largest error of each quantity over all cases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moiie_export.parity.report import Check
from moiie_export.report.axes import Axes
from moiie_export.report.document import Document, real
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import listed, short
from moiie_export.report.scale import ErrorScale
from moiie_export.report.section import Section
from moiie_export.report.table import figure, figures, table

SYMBOLS = ("circle", "square", "diamond", "triangle", "wedge")
"""One for each series; beyond that they begin again."""


@dataclass(frozen=True)
class LayerErrors:
    """One phase.

    Attributes:
        layers: ascending.
        series: quantity -> layer -> the largest error of any case.
        bounds: what they are judged by, ascending.
        failed: the layers with a failed check.
    """

    phase: str
    layers: list[int]
    series: dict[str, dict[int, float]]
    bounds: list[float]
    failed: list[int]

    @property
    def scale(self) -> ErrorScale:
        """A scale for everything in the chart."""
        return ErrorScale.of((value for found in self.series.values() for value in found.values()), self.bounds)

    def description(self) -> str:
        """What there is to see, in words."""
        worst = [f"{name} at most {short(_worst(found.values()))}" for name, found in self.series.items()]
        wrong = f"Failed: {_named(self.failed)}." if self.failed else "All within the bound."
        bound = ", ".join(short(bound) for bound in self.bounds)
        return f"Layers {listed(self.layers)}: {'; '.join(worst)}. Bound {bound}. {wrong}"


def layer_errors(document: Document) -> list[LayerErrors]:
    """The errors of each phase that has layers, in the order of judgement."""
    phases: dict[str, list[Check]] = {}
    for check in document.checks:
        if check.layer is not None and check.metric == "error" and check.value is not None:
            phases.setdefault(check.phase, []).append(check)
    result = []
    for phase, checks in phases.items():
        series: dict[str, dict[int, float]] = {}
        for check in checks:
            found = series.setdefault(check.stage, {})
            assert check.layer is not None
            found[check.layer] = _worst([float(check.value or 0), found.get(check.layer, 0.0)])
        layers = sorted({layer for found in series.values() for layer in found})
        failing = {check.layer for check in document.report.failures if check.phase == phase}
        bounds = sorted({float(check.bound) for check in checks if check.bound is not None})
        result.append(LayerErrors(phase, layers, series, bounds, [layer for layer in layers if layer in failing]))
    return result


def section(document: Document) -> Section | None:
    """The charts; None where nothing was measured by layer."""
    found = layer_errors(document)
    if not found:
        return None
    lead = tag(
        "p",
        "Every phase is fed what the checkpoint’s model gives it. Within a phase a wrong layer spoils those behind it, so ",
        "the first one beyond the bound is at fault. Points are the largest error over all cases; 0 is bit for bit the same.",
        class_="lead",
    )
    drawn = [
        figure(_draw(each, index), _caption(each), _table(each.phase, document)) for index, each in enumerate(found)
    ]
    return Section("layers", "Error by layer", join([lead, figures(drawn)]))


def _draw(errors: LayerErrors, index: int) -> Any:
    legend = [(symbol, f"series s{number} area", name) for name, symbol, number in _styles(errors)]
    axes = Axes(f"layers-{index}", f"{errors.phase}: error by layer", errors.description(), legend)
    axes.across(errors.layers[0], errors.layers[-1], "layer")
    axes.up(errors.scale)
    for layer in errors.failed[:1]:
        axes.band(layer, f"layer {layer} first")
    axes.bounds(errors.bounds)
    for name, symbol, number in _styles(errors):
        points = sorted(errors.series[name].items())
        axes.trail([(layer, value) for layer, value in points], f"trail s{number}")
        for layer, value in points:
            note = f"layer {layer}, {name}: {short(value)}"
            axes.mark((layer, value), symbol, f"series s{number} area", note)
    return axes.drawing


def _styles(errors: LayerErrors) -> list[tuple[str, str, int]]:
    """(series, symbol, number of its colour)."""
    return [(name, SYMBOLS[index % len(SYMBOLS)], index % len(SYMBOLS)) for index, name in enumerate(errors.series)]


def _caption(errors: LayerErrors) -> Markup:
    first = f"first failure in layer {errors.failed[0]}" if errors.failed else "all within the bound"
    return join([tag("strong", errors.phase), f": {first}"])


def _table(phase: str, document: Document) -> Markup:
    """Every error of the phase, a row for each case and layer; keys and values apart where they were measured so."""
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for check in document.checks:
        if check.phase == phase and check.layer is not None and check.metric == "error" and check.value is not None:
            rows.setdefault((check.case, check.layer), {})[check.stage] = float(check.value)
    for measured in document.phases:
        for layer in measured.layers if measured.name == phase else ():
            found = rows.setdefault((measured.case, layer["layer"]), {})
            found |= {name: real(value) for name, value in layer["errors"].items()}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    columns = ["case", "layer", *names]
    return table(f"{phase}: errors by case and layer", columns, [_row(key, rows[key], names) for key in rows])


def _row(key: tuple[str, int], errors: Mapping[str, float], names: Sequence[str]) -> list[Any]:
    return [*key, *(errors.get(name) for name in names)]


def _worst(values: Iterable[float]) -> float:
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def _named(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {listed(layers)}"
