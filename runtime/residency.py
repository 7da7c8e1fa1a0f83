"""Which bytes of the weight file a phase uses, and giving back the mapped pages of those it no longer needs."""

from __future__ import annotations

import ctypes
import logging
import mmap
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from moiie_runtime.tensors import TensorInfo

_log = logging.getLogger(__name__)
_MAPS = Path("/proc/self/maps")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")


@dataclass(frozen=True)
class WeightView:
    """A weight as a graph uses it: a whole tensor of the file, or one expert of a stacked one.

    Attributes:
        shape: its dimensions.
        offset: first byte in the file.
        nbytes: length in bytes.
    """

    shape: tuple[int, ...]
    offset: int
    nbytes: int


def weight_views(header: Mapping[str, TensorInfo], names: Iterable[str]) -> Iterator[WeightView]:
    """Where the weights that `residency` names lie; `x.experts.2.y` is row 2 of the tensor `x.experts.y`.

    Names that the file does not have are left out.
    """
    for name in names:
        found = stored_tensor(header, name)
        if found is None:
            continue
        info, share = found
        if share == 1 and info.name == name:
            yield WeightView(info.shape, info.offset, info.nbytes)
        else:
            size, expert = info.nbytes // share, _expert(name)
            yield WeightView(info.shape[1:], info.offset + expert * size, size)


def stored_tensor(header: Mapping[str, TensorInfo], name: str) -> tuple[TensorInfo, int] | None:
    """The tensor of the file that holds a weight, and how many weights it holds; None when there is none."""
    info = header.get(name)
    if info is not None:
        return info, 1
    match = _EXPERT.fullmatch(name)
    stacked = None if match is None else header.get(match[1] + match[3])
    return (stacked, stacked.shape[0]) if stacked is not None and _expert(name) < stacked.shape[0] else None


def _expert(name: str) -> int:
    match = _EXPERT.fullmatch(name)
    return 0 if match is None else int(match[2])


def release_pages(path: Path, views: Iterable[WeightView]) -> int:
    """Advise the system that these bytes of a mapped file are not needed now.

    They leave this process and are read again, from the page cache or the file, when something touches them. Only
    whole pages inside a view go. The mappings must not have been written to: such changes would be lost.

    Args:
        path: the file, as it was opened.
        views: its parts.

    Returns:
        Bytes of address space that were given back; 0 where the system has no such advice.
    """
    if not sys.platform.startswith("linux"):
        return 0
    parts = sorted((view.offset, view.offset + view.nbytes) for view in views)  # they do not overlap
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    released = 0
    for address, start, stop in _mappings(path):
        for first, last in parts[bisect_right(parts, start, key=_end) : bisect_left(parts, stop, key=_begin)]:
            low = -(-max(first, start) // mmap.PAGESIZE) * mmap.PAGESIZE
            high = min(last, stop) // mmap.PAGESIZE * mmap.PAGESIZE
            if low < high and madvise(address + low - start, high - low, mmap.MADV_DONTNEED) == 0:
                released += high - low
    _log.debug("gave back %d bytes of %s", released, path)
    return released


_begin, _end = itemgetter(0), itemgetter(1)


def _mappings(path: Path) -> Iterator[tuple[int, int, int]]:
    """Address, and first and last byte in the file, of each mapping of the file into this process."""
    wanted = str(path.resolve())
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted:
            begin, end = (int(value, 16) for value in fields[0].split("-"))
            offset = int(fields[2], 16)
            yield begin, offset, offset + end - begin
