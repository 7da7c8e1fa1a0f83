"""Sizes as people write them."""

from __future__ import annotations

import re

from moiie_runtime.errors import MoiieError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(value: int | str) -> int:
    """Bytes of a size such as 8589934592, "8GiB" or "500 MB".

    Raises:
        MoiieError: not a size, or not above 0.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = (
        re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]{0,3})", value.strip(), re.I)
        if isinstance(value, str)
        else None
    )
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise MoiieError(f"a memory size must be a number of bytes or a text such as 8GiB, got {value!r}")
    return size


def readable(size: float) -> str:
    """A number of bytes for people: `123 B`, `1.5 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"
