"""Versions as numbers, to be compared."""

from __future__ import annotations

import re


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version in order: (580, 65, 6) for `580.65.06`. Text of a file may hold anything: none is refused."""
    return tuple(int(part) for part in re.findall(r"\d{1,18}", text))
