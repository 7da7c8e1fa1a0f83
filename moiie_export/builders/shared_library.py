"""Whether a file is a shared library that exports a function: read from its headers, nothing in it is loaded or run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from moiie_runtime.strict_files import open_regular

_HEADER = struct.Struct(
    "<4s2B10xH14xQ14xHH6x"
)  # magic, class, data; type; place of the segments; their size and number
_SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, place, address, -, bytes in the file, ...
_ENTRY = struct.Struct("<QQ")
_SHARED, _LOAD, _DYNAMIC, _STRTAB, _STRSZ = 3, 1, 2, 5, 10
_LITTLE_64 = (b"\x7fELF", 2, 1)
_LIMIT = 1 << 20
"""Bytes of a table that is read; those of libraries are far smaller."""


def library_problem(path: Path, function: str) -> str | None:
    """What is wrong with a shared library (ELF, 64 bits, little-endian: Linux on x86-64 and AArch64).

    Args:
        path: the file.
        function: what it is to export.

    Returns:
        Half a sentence about the file, or None: its loaded parts are all there, and its dynamic symbols name the function.

    Raises:
        MoiieError: it cannot be opened.
    """
    with open_regular(path) as file:
        try:
            names = _names(file, path.stat().st_size)
        except ValueError as error:
            return str(error)
    return None if function.encode() + b"\0" in names else f"exports no {function}"


def _names(file: BinaryIO, size: int) -> bytes:
    """The names of the dynamic symbols; ValueError says why there are none."""
    head = file.read(_HEADER.size)
    if not head.startswith(_LITTLE_64[0]):
        raise ValueError("is no shared library")
    if len(head) < _HEADER.size:
        raise ValueError(f"ends after {len(head)} bytes")
    *machine, kind, start, length, count = _HEADER.unpack(head)
    if tuple(machine) != _LITTLE_64 or kind != _SHARED:
        raise ValueError("is no shared library for Linux on a processor of 64 bits")
    if length != _SEGMENT.size:
        raise ValueError("is damaged: its header names no segments")
    segments = [*_SEGMENT.iter_unpack(_read(file, start, length * count, size))]
    for kind, _, place, _, _, stored, *_ in segments:
        if kind == _LOAD and place + stored > size:
            raise ValueError(f"is incomplete: {size} of at least {place + stored} bytes")
    dynamic: dict[int, int] = {}
    for kind, _, place, _, _, stored, *_ in segments:
        if kind == _DYNAMIC:
            dynamic |= dict(_ENTRY.iter_unpack(_read(file, place, stored // _ENTRY.size * _ENTRY.size, size)))
    address = dynamic.get(_STRTAB, 0)
    for kind, _, place, begin, _, stored, *_ in segments:
        if kind == _LOAD and begin <= address < begin + stored:
            return _read(file, place + address - begin, dynamic.get(_STRSZ, 0), size)
    raise ValueError("is damaged: it has no table of names")


def _read(file: BinaryIO, place: int, count: int, size: int) -> bytes:
    if count > _LIMIT or place + count > size:
        raise ValueError("is damaged: a table lies behind its end")
    file.seek(place)
    return file.read(count)
