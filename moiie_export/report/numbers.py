"""How numbers are written: the same way in tables, charts and pictures."""

from __future__ import annotations

import math
import re

Number = float | int | None


class Share(float):
    """A share of a whole, written as a percentage."""


def short(value: Number) -> str:
    """Three significant digits for a float, all digits for an integer, a dash for nothing, a share as a percentage."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    return percent(value) if isinstance(value, Share) else _compact(f"{value:.3g}")


def power(value: float) -> str:
    """A number of one digit in the least space: 1e-4, 0.05."""
    return _compact(f"{value:.0e}") if 0 < value < 0.01 else short(value)


def _compact(text: str) -> str:
    """The exponent without its leading zeros."""
    return re.sub(r"e([+-])0*(?=\d)", lambda match: "e" + match[1].replace("+", ""), text)


def percent(share: float) -> str:
    """A share as a percentage, never rounded up to 100 nor down to 0."""
    if 0 < share < 0.01 or 0.99 < share < 1:
        return f"{math.floor(share * 1000) / 10:g} %" if share > 0.5 else f"{math.ceil(share * 1000) / 10:g} %"
    return f"{share * 100:.0f} %"


def counted(count: int, singular: str, plural: str = "") -> str:
    """A count with its noun."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def listed(numbers: list[int]) -> str:
    """Ascending integers with runs joined: 0\N{EN DASH}3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}\N{EN DASH}{b}" for a, b in runs)
