"""The charts as PNG files, for papers and slides: what the page draws, drawn by matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moiie_export.report.balance import load_balance
from moiie_export.report.document import Document
from moiie_export.report.html import visible
from moiie_export.report.layers import layer_errors
from moiie_export.report.logits import logit_tracks
from moiie_export.report.margins import margins
from moiie_export.report.numbers import percent, short
from moiie_export.report.routing import ModalityRouting, modality_routing
from moiie_export.report.scale import ErrorScale
from moiie_runtime.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_BLUE, _RED, _ORANGE = "#0069a8", "#c04a00", "#e69f00"
_COLOURS = (_BLUE, _RED, "#00765a", "#8a3fa0", "#776000")
_FILLS = ("#1f6fb2", _ORANGE, "#0b6e4f", "#8a3fa0")
_ON_FILL = dict(zip(_FILLS, ("white", "black", "white", "white"), strict=True))
_MARKERS = "osD^v"


def draw_pngs(document: Mapping[str, Any]) -> dict[str, bytes]:
    """The charts that a document has something for.

    Args:
        document: as for `render`.

    Returns:
        File name -> PNG; equal for equal documents and the same matplotlib.

    Raises:
        MissingDependency: matplotlib is not installed.
        MoiieError: it is no such document.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependency("pictures need matplotlib", "pip install 'moiie-export[report]'") from error
    found = Document(document)
    drawn = {name: draw(found) for name, draw in CHARTS.items()}
    return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


def _layers(document: Document) -> Figure | None:
    found = layer_errors(document)
    if not found:
        return None
    figure, all_axes = _panels(len(found), (4.6, 3.4))
    for errors, axes in zip(found, all_axes, strict=True):
        scale = errors.scale
        for index, (name, series) in enumerate(errors.series.items()):
            points = sorted(series.items())
            axes.plot(
                [layer for layer, _ in points],
                [scale.place(value) for _, value in points],
                label=name,
                marker=_MARKERS[index % 5],
                color=_COLOURS[index % 5],
                markersize=4,
                linewidth=0.9,
            )
        if errors.failed:
            axes.axvspan(errors.failed[0] - 0.2, errors.failed[0] + 0.2, color="#ffe1cf", zorder=0)
        _errors_up(axes, scale, errors.bounds)
        _whole_numbers(axes)
        _words(axes, errors.phase, "layer")
        axes.legend(fontsize=7, frameon=False)
    return figure


def _routing(document: Document) -> Figure | None:
    found = modality_routing(document)
    if not found:
        return None
    sides = [(each, side) for each in found for side in (["PyTorch"] if each.same else ["PyTorch", "bundle"])]
    experts, rows = (max(map(len, lengths)) for lengths in _sizes(found))
    figure, all_axes = _panels(len(sides), (max(2.6, 0.42 * experts + 1.2), 0.28 * rows + 1.2))
    for (each, side), axes in zip(sides, all_axes, strict=True):
        shares = [
            [
                count / layer.tokens if layer.tokens and (allowed or count) else float("nan")
                for count, allowed in zip(
                    layer.reference if side == "PyTorch" else layer.bundle, layer.allowed, strict=True
                )
            ]
            for layer in each.layers.values()
        ]
        axes.imshow(shares, cmap="Blues", vmin=0, aspect="auto")
        _cell_numbers(axes, shares)
        names = [f"{layer}  ({percent(layer_found.agreement)})" for layer, layer_found in each.layers.items()]
        axes.set_yticks(range(len(names)), names, fontsize=7)
        _whole_numbers(axes)
        both = "" if each.same else f", {side}"
        _words(axes, f"{each.modality} tokens{both}, %", "expert", "layer (agreement)")
    return figure


def _balance(document: Document) -> Figure | None:
    found = load_balance(document)
    if found is None:
        return None
    figure, [axes] = _panels(1, (5.4, 0.26 * len(found.layers) + 1.4))
    for row, (layer, counts) in enumerate(found.layers.items()):
        start, total = 0.0, sum(counts) or 1
        for expert, count in enumerate(counts):
            kind = found.kinds[expert]
            fill = _FILLS[found.colour(kind) if kind else -1]
            axes.barh(row, count / total, left=start, color=fill, edgecolor="white", linewidth=0.6)
            if count / total > 0.05:
                axes.text(
                    start + count / total / 2,
                    row,
                    str(expert),
                    fontsize=6,
                    ha="center",
                    va="center",
                    color=_ON_FILL[fill],
                )
            start += count / total
        axes.text(1.01, row, f"× {found.imbalance(layer):.2f}", fontsize=7, va="center")
    axes.set_yticks(range(len(found.layers)), [str(layer) for layer in found.layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    for kind in found.groups:
        axes.bar(0, 0, color=_FILLS[found.colour(kind)], label=f"{kind} experts")
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    _words(axes, "load balance, experts in order; × busiest over mean", "share of tokens", "layer")
    return figure


def _margins(document: Document) -> Figure | None:
    found = margins(document)
    if found is None:
        return None
    figure, [axes] = _panels(1, (5.0, 3.8))
    height = 0.8 / len(found.counts)
    for index, (modality, counts) in enumerate(found.counts.items()):
        places = [row + index * height for row in range(len(counts))]
        bars = axes.barh(places, counts, height=height, color=_FILLS[index % 4], label=modality)
        axes.bar_label(bars, fontsize=6, padding=2)
    labels = [found.label(index) for index in range(len(found.edges) - 1)]
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(labels))], labels, fontsize=7)
    if found.tie:
        tie = found.place(found.tie) - height / 2 - 0.1
        axes.axhline(tie, color=_RED, linestyle="--", linewidth=1)
        axes.text(0.99, tie, f"ties below {short(found.tie)}", color=_RED, fontsize=7, ha="right", va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(fontsize=7, frameon=False)
    _words(axes, "router margins", "decisions", "margin")
    return figure


def _logits(document: Document) -> Figure | None:
    tracks = logit_tracks(document)
    if not tracks:
        return None
    figure, all_axes = _panels(len(tracks), (4.2, 3.2))
    for track, axes in zip(tracks, all_axes, strict=True):
        for start, stop in track.vision:
            axes.axvspan(start - 0.5, stop - 0.5, color="#eceff3", zorder=0)
        axes.axvline(track.prompt - 0.5, color="#55606b", linestyle=":", linewidth=1)
        for same, marker, colour in ((True, "o", _BLUE), (False, "x", _RED)):
            points = [point for point in track.points if point.same is same]
            heights = [track.scale.place(point.error) for point in points]
            label = "same best token" if same else "another"
            positions = [point.position for point in points]
            axes.scatter(positions, heights, s=12, marker=marker, color=colour, label=label)
        _errors_up(axes, track.scale, track.bounds)
        axes.legend(fontsize=7, frameon=False)
        _words(axes, track.case, "position")
    return figure


CHARTS: Mapping[str, Callable[[Document], Figure | None]] = {
    "error-by-layer.png": _layers,
    "routing.png": _routing,
    "load-balance.png": _balance,
    "router-margins.png": _margins,
    "logits.png": _logits,
}
"""File name -> what draws it, or gives None where the document has nothing for it."""


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure of panels beside each other, at most three in a row."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=_DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def _errors_up(axes: Axes, scale: ErrorScale, bounds: Sequence[float]) -> None:
    """The page's scale of errors, with room for zeros and NaN."""
    ticks = scale.ticks()
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", linewidth=0.4)
    for bound in bounds:
        axes.axhline(scale.place(bound), color=_RED, linestyle="--", linewidth=1, label=f"bound {short(bound)}")


def _words(axes: Axes, title: str, across: str, up: str = "error") -> None:
    """Title and axis names; names out of a document are text and never formulas."""
    axes.set_title(visible(title), fontsize=9, parse_math=False)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def _cell_numbers(axes: Axes, shares: Sequence[Sequence[float]]) -> None:
    highest = max((share for row in shares for share in row if share == share), default=1.0)
    for row, cells in enumerate(shares):
        for column, share in enumerate(cells):
            colour = "white" if share > 0.5 * highest else "black"
            text = "·" if share != share else f"{share * 100:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _sizes(found: Sequence[ModalityRouting]) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
    """Of every heat map its columns and its rows."""
    return [next(iter(each.layers.values())).allowed for each in found], [list(each.layers) for each in found]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script without a font here
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
