"""A frame for error charts: positions across, errors on a logarithmic scale up."""

from __future__ import annotations

from collections.abc import Sequence

from moiie_export.report.numbers import short
from moiie_export.report.scale import ErrorScale
from moiie_export.report.svg import CHARACTER, WIDTH, Drawing, Point, legend_lines

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 40.0, 10.0, 12.0, 34.0, 190.0


class Axes:
    """Draws points (position, error). Call `across` and `up` before anything is drawn.

    Args:
        name, title, description: of the drawing.
        legend: (symbol, class, name) of each series, shown above the frame.
    """

    def __init__(self, name: str, title: str, description: str, legend: Sequence[tuple[str, str, str]]) -> None:
        self._top = _TOP + 16 * legend_lines(legend, _LEFT, WIDTH)
        self._bottom = self._top + _HEIGHT
        self.drawing = Drawing(name, title, description, (WIDTH, self._bottom + _BOTTOM))
        self.drawing.legend(legend, _LEFT, 8)
        self._from, self._to = 0.0, 1.0
        self._scale = ErrorScale(-1, 0, zero=False, nan=False)

    def across(self, first: float, last: float, label: str) -> None:
        """The range of positions, with ticks at whole numbers."""
        self._from, self._to = float(first), float(last)
        for tick in _whole_ticks(int(first), int(last)):
            x = self._x(tick)
            self.drawing.line((x, self._bottom), (x, self._bottom + 4), "axis")
            self.drawing.text(x, self._bottom + 12, str(tick), "label", "middle")
        self.drawing.text((_LEFT + WIDTH - _RIGHT) / 2, self._bottom + 26, label, "label", "middle")

    def up(self, scale: ErrorScale) -> None:
        """The scale of errors, with a line at each tick."""
        self._scale = scale
        for place, label in scale.ticks():
            y = self._bottom - place * _HEIGHT
            self.drawing.line((_LEFT, y), (WIDTH - _RIGHT, y), "grid")
            self.drawing.text(_LEFT - 5, y, label, "label", "end")

    def band(self, position: float, label: str) -> None:
        """A band that marks one position."""
        x, half = self._x(position), max(4.0, min(12.0, self._step() / 2))
        self.drawing.rect((x - half, self._top), (2 * half, _HEIGHT), "failing", label)

    def shade(self, start: float, stop: float, label: str) -> None:
        """A shaded stretch of positions, named at its top where there is room."""
        left, right = self._x(start - 0.5), self._x(stop - 0.5)
        self.drawing.rect((left, self._top), (right - left, _HEIGHT), "shade", label)
        if right - left > CHARACTER * len(label) + 4:
            self.drawing.text((left + right) / 2, self._top + 8, label, "label", "middle")

    def bounds(self, bounds: Sequence[float]) -> None:
        """Dashed lines at the largest errors allowed."""
        for bound in bounds:
            y = self._bottom - self._scale.place(bound) * _HEIGHT
            self.drawing.line((_LEFT, y), (WIDTH - _RIGHT, y), "bound")
            self.drawing.text(WIDTH - _RIGHT, y - 8, f"bound {short(bound)}", "label strong", "end")

    def trail(self, points: Sequence[Point], class_: str) -> None:
        """A line through points."""
        self.drawing.path([self._at(point) for point in points], class_)

    def mark(self, point: Point, shape: str, class_: str, note: str) -> None:
        """A symbol at a point, with a tooltip."""
        self.drawing.mark(self._at(point), shape, class_, note)

    def divide(self, position: float) -> None:
        """A vertical line between two positions."""
        self.drawing.line((self._x(position), self._top), (self._x(position), self._bottom), "divide")

    def _at(self, point: Point) -> Point:
        return self._x(point[0]), self._bottom - self._scale.place(point[1]) * _HEIGHT

    def _x(self, position: float) -> float:
        inset = 8.0
        width = WIDTH - _LEFT - _RIGHT - 2 * inset
        span = self._to - self._from
        share = 0.5 if span == 0 else min(max((position - self._from) / span, -inset / width), 1 + inset / width)
        return _LEFT + inset + width * share

    def _step(self) -> float:
        return abs(self._x(self._from + 1) - self._x(self._from)) or 24.0


def _whole_ticks(first: int, last: int) -> list[int]:
    """At most eight whole numbers, a round distance apart."""
    span = last - first
    step = next(step for power in range(9) for base in (1, 2, 5) if (step := base * 10**power) * 7 >= span)
    return list(range(-(-first // step) * step, last + 1, step))
