"""A stand-in for a plugin library where nothing loads it: the headers of a shared library, and names that it exports."""

from __future__ import annotations

import struct
from pathlib import Path


def write_shared_library(path: Path, *names: str) -> Path:
    """One segment with a dynamic section and a table of the names; by default what plugin libraries export."""
    table = b"\0" + b"".join(name.encode() + b"\0" for name in names or ("getCreators",))
    place = 64 + 2 * 56 + 3 * 16
    header = struct.pack("<4s12B", b"\x7fELF", 2, 1, 1, *[0] * 9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    whole = place + len(table)
    segments = struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, whole, whole, 4096)
    segments += struct.pack("<IIQQQQQQ", 2, 4, 176, 176, 0, 48, 48, 8)
    path.write_bytes(header + segments + struct.pack("<6Q", 5, place, 10, len(table), 0, 0) + table)
    return path
