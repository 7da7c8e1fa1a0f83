"""A heat map of shares: a row for each layer, a column for each expert, the number in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiie_export.report.svg import WIDTH, Drawing, Point

LEVELS = 8
"""Steps of colour: `h0` to `h7`, with `t0` to `t7` for the text on them."""
_LABEL, _ASIDE, _TOP, _ROW = 34.0, 58.0, 40.0, 24.0
_NARROWEST, _WIDEST = 24.0, 48.0
_CLOSED = "·"


@dataclass(frozen=True)
class Cell:
    """A share, None where there can be none; a tooltip; and whether the other side's number differs."""

    share: float | None
    note: str
    changed: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its name, a word beside it, whether that word is bad news, and its cells."""

    label: str
    aside: str
    alarming: bool
    cells: Sequence[Cell]


def heat_map(words: tuple[str, str, str], heads: tuple[str, str, str], rows: Sequence[Row]) -> Drawing:
    """Draw it. The highest share has the strongest colour.

    Args:
        words: name, title and description of the drawing.
        heads: of the row names, of the words beside them, and of the columns.
        rows: all with as many cells.
    """
    columns = max(len(row.cells) for row in rows)
    left = _LABEL + _ASIDE
    cell = min(max((WIDTH - left) / columns, _NARROWEST), _WIDEST)
    drawing = Drawing(*words, (max(WIDTH, left + columns * cell), _TOP + _ROW * len(rows) + 4))
    drawing.text(_LABEL - 6, 26, heads[0], "label", "end")
    drawing.text(left - 8, 26, heads[1], "label", "end")
    seen = min(columns * cell, WIDTH - left)  # before anyone scrolls
    drawing.text(left + seen / 2, 10, heads[2], "label", "middle")
    for column in range(columns):
        drawing.text(left + (column + 0.5) * cell, 26, str(column), "label", "middle")
    highest = max((found.share or 0 for row in rows for found in row.cells), default=0) or 1
    for index, row in enumerate(rows):
        y = _TOP + index * _ROW
        drawing.text(_LABEL - 6, y + _ROW / 2, row.label, "label", "end")
        drawing.text(left - 8, y + _ROW / 2, row.aside, "label wrong" if row.alarming else "label", "end")
        for column, found in enumerate(row.cells):
            _draw_cell(drawing, (left + column * cell, y), cell, found, highest)
    return drawing


def _draw_cell(drawing: Drawing, corner: Point, width: float, cell: Cell, highest: float) -> None:
    level = min(int((cell.share or 0) / highest * LEVELS), LEVELS - 1)
    closed = cell.share is None
    kind = "closed" if closed else f"h{level} changed" if cell.changed else f"h{level}"
    drawing.rect((corner[0] + 1, corner[1] + 1), (width - 2, _ROW - 2), f"cell {kind}", cell.note)
    text, class_ = (_CLOSED, "label") if cell.share is None else (f"{cell.share * 100:.0f}", f"t{level}")
    drawing.text(corner[0] + width / 2, corner[1] + _ROW / 2, text, class_, "middle")
