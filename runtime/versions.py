"""Versions as numbers, to be compared."""

from __future__ import annotations

import re


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version in order: (580, 65, 6) for `580.65.06`."""
    return tuple(int(part) for part in re.findall(r"\d+", text))
