"""Drawings as inline SVG: shapes take their colours from the page's style sheet, so that they follow its light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from moiie_export.report.html import tag

WIDTH = 310
"""What a narrow phone shows without scrolling; drawings are this wide unless their content needs more."""
TEXT = 11
"""Size of labels; with `CHARACTER` an estimate of their width."""
CHARACTER = 6.1
Point = tuple[float, float]


class Drawing:
    """Shapes in the order they are drawn.

    Args:
        name: unique on the page; the ids of its title and description are made from it.
        title: what it shows, for those who cannot see it.
        description: what there is to see in it, in words.
        size: width and height.
    """

    def __init__(self, name: str, title: str, description: str, size: tuple[float, float]) -> None:
        self._name, self.title, self._description = name, title, description
        self.width, self.height = size
        self._parts: list[Markup] = []

    def add(self, element: str, *children: Any, **attributes: Any) -> None:
        """An element of SVG."""
        self._parts.append(tag(element, *children, **attributes))

    def text(self, x: float, y: float, text: str, class_: str = "", anchor: str = "start") -> None:
        """A label; `y` is its middle."""
        self.add("text", text, x=float(x), y=float(y), dy="0.35em", text_anchor=anchor, class_=class_ or None)

    def rect(self, corner: Point, size: Point, class_: str, note: str | None = None) -> None:
        """A filled rectangle with an optional tooltip."""
        x, y = corner
        inside = None if note is None else tag("title", note)
        self.add(
            "rect", inside, x=float(x), y=float(y), width=float(size[0]), height=float(max(size[1], 0)), class_=class_
        )

    def line(self, start: Point, stop: Point, class_: str) -> None:
        """A straight line."""
        self.add("line", x1=float(start[0]), y1=float(start[1]), x2=float(stop[0]), y2=float(stop[1]), class_=class_)

    def path(self, points: Sequence[Point], class_: str) -> None:
        """A line through points."""
        self.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)

    def mark(self, at: Point, shape: str, class_: str, note: str | None = None) -> None:
        """A small symbol: one of `SHAPES`."""
        inside = None if note is None else tag("title", note)
        self.add("path", inside, d=SHAPES[shape], transform=f"translate({at[0]:.1f} {at[1]:.1f})", class_=class_)

    def legend(self, entries: Sequence[tuple[str, str, str]], left: float, y: float) -> None:
        """Symbols with names, in as many lines as `legend_height` says; entries are (shape, class, name)."""
        for (shape, class_, name), (x, line) in zip(entries, _flow(entries, left, self.width), strict=True):
            self.mark((x + 4, y + 16 * line), shape, class_)
            self.text(x + 12, y + 16 * line, name)

    def svg(self) -> Markup:
        """The drawing; never scaled below its size, so that labels stay legible."""
        ids = f"{self._name}-title", f"{self._name}-text"
        return tag(
            "svg",
            tag("title", self.title, id=ids[0]),
            tag("desc", self._description, id=ids[1]),
            self._parts,
            role="img",
            aria_labelledby=" ".join(ids),
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            style=f"min-width:{self.width:g}px;max-width:{self.width * 1.4:.0f}px",
        )


SHAPES = {
    "circle": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
    "square": "M-3 -3h6v6h-6z",
    "diamond": "M0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    "triangle": "M0 -4l4 7h-8z",
    "wedge": "M0 4l4 -7h-8z",
    "cross": "M-4 -4l8 8M4 -4l-8 8",
    "bar": "M-4 -4h8v8h-8z",
    "dash": "M-5 0h10",
}
"""Symbols around (0, 0). `cross` and `dash` are lines, the others areas."""


def legend_lines(entries: Sequence[tuple[str, str, str]], left: float, width: float) -> int:
    """How many lines a legend takes."""
    return max((line for _, line in _flow(entries, left, width)), default=-1) + 1


def _flow(entries: Sequence[tuple[str, str, str]], left: float, width: float) -> list[tuple[float, int]]:
    """(x, line) of every entry."""
    places, x, line = [], left, 0
    for _, _, name in entries:
        needed = 12 + CHARACTER * len(name)
        if x > left and x + needed > width:
            x, line = left, line + 1
        places.append((x, line))
        x += needed + 12
    return places
