"""A logarithmic scale for errors that also has room for exact zeros, below it, and for NaN, above it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MOST_TICKS = 7


@dataclass(frozen=True)
class ErrorScale:
    """Decades `low` to `high`, a row for zeros below and one for NaN and infinities above where there are any."""

    low: int
    high: int
    zero: bool
    nan: bool

    @classmethod
    def of(cls, values: Iterable[float], bounds: Iterable[float]) -> ErrorScale:
        """The smallest scale for these values and bounds."""
        found = [*values, *bounds]
        usual = [value for value in found if math.isfinite(value) and value > 0]
        low = math.floor(math.log10(min(usual, default=1e-1)))
        high = math.ceil(math.log10(max(usual, default=1.0)))
        nan = any(not math.isfinite(value) for value in found)
        return cls(low, max(high, low + 1), any(value == 0 for value in found), nan)

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the bottom, 1 at the top."""
        if not math.isfinite(value):
            return 1.0
        if value <= 0:
            return 0.0
        return (math.log10(value) - self.low + self.zero) / self._rows

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels, bottom to top; every decade, or every second or third where there are many."""
        step = math.ceil((self.high - self.low + 1) / _MOST_TICKS)
        marks = [(self.place(10.0**power), f"1e{power}") for power in range(self.low, self.high + 1, step)]
        return [*[(0.0, "0")] * self.zero, *marks, *[(1.0, "NaN")] * self.nan]

    @property
    def _rows(self) -> int:
        return self.high - self.low + self.zero + self.nan
