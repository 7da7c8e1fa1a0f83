"""`rtn` compiled: the same numbers bit for bit, several times as fast; without a compiler torch does it."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moiie_export.quantize.packing import SCALES, Array, Float32, Int8, Quantized
from moiie_export.quantize.scheme import Scheme
from moiie_runtime.errors import MoiieError
from moiie_runtime.native.compiling import compiled

REGISTERS = 0
"""Bits of the registers that are used; 0 for the widest that the processor has."""

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("rounding.cpp")
# Products and sums stay apart: fused they would be rounded once instead of twice.
_FLAGS = ("-O3", "-Wno-psabi", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")


def round_natively(weight: Float32, scheme: Scheme) -> Quantized | None:
    """What `rtn` gives; None where it cannot be done: no compiler, or another group size.

    Args:
        weight: float32 [rows, columns].
        scheme: int4 or int8.

    Returns:
        Numbers and scales; a group that has no scale has infinity for one, and no numbers.
    """
    found = _rounded(np.require(weight, np.float32, ["C"]), scheme, packed=False)
    return None if found is None else Quantized(*found[:2])


def round_stored(rows: Array, scheme: Scheme) -> dict[str, Array] | None:
    """What `stored_arrays` of `rtn` gives, straight from a checkpoint's numbers: they are not widened in memory first.

    Args:
        rows: float32 or bfloat16 (as uint16) [rows, columns]; of other types nothing is made.
        scheme: int4 or int8.

    Returns:
        None also where a group has no scale; `rtn` says why.
    """
    if rows.dtype not in (np.float32, np.uint16) or not rows.flags.c_contiguous:
        return None
    found = _rounded(rows, scheme, packed=scheme.bits == 4)
    if found is None or found[2] < found[1].size:
        return None
    return {"": found[0], SCALES: found[1]}


def can_round() -> bool:
    """Whether numbers are rounded without torch here."""
    return _function() is not None


def first_divisors(scheme: Scheme) -> tuple[float, float]:
    """What a group's largest and smallest number are divided by to find its first scale."""
    bottom, beyond = float(scheme.lowest), 0.5 if scheme.bits == 4 else 0.0
    return -bottom - 1 + beyond, bottom - beyond


def _rounded(rows: Array, scheme: Scheme, *, packed: bool) -> tuple[Int8, Array, int] | None:
    """Values, scales, and how many groups have one."""
    function = _function()
    if function is None:
        return None
    count, columns = rows.shape
    values = np.zeros((count, columns // 2 if packed else columns), np.int8)
    scales = np.empty((count, columns // scheme.group_size), np.float16)
    known = np.array([scheme.lowest, -scheme.lowest - 1, *first_divisors(scheme)], np.float32)
    source, span, to_values, to_scales = (array.ctypes.data for array in (rows, known, values, scales))
    brain, fitted = rows.dtype == np.uint16, scheme.bits == 4
    sizes = (scales.size, scheme.group_size)
    done = function(source, brain, *sizes, span, fitted, packed, REGISTERS, to_values, to_scales)
    return (values, scales, done) if done >= 0 else None


@cache
def _function() -> Any:
    """The compiled function; other threads run while it does."""
    try:
        library = ctypes.CDLL(str(compiled("rounding", [_SOURCE], _FLAGS, "the rounding of weights")))
    except (MoiieError, OSError) as error:
        _log.info("weights are rounded by torch, which takes several times as long: %s", error)
        return None
    function = library.round_groups
    address, count = ctypes.c_void_p, ctypes.c_int64
    flag = ctypes.c_int
    function.argtypes = (address, flag, count, count, address, flag, flag, flag, address, address)
    function.restype = count
    return function
