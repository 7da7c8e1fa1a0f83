"""`rtn` compiled: the same numbers bit for bit, several times as fast; without a compiler torch does it."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moiie_export.quantize.packing import Float32, Quantized
from moiie_export.quantize.scheme import Scheme
from moiie_runtime.errors import MoiieError
from moiie_runtime.native.compiling import compiled

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("rounding.cpp")
# Products and sums stay apart: fused they would be rounded once instead of twice.
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")


def round_natively(weight: Float32, scheme: Scheme, divisors: tuple[float, float]) -> Quantized | None:
    """What `rtn` gives; None where it cannot be done: no compiler, or another group size.

    Args:
        weight: float32 [rows, columns].
        scheme: int4 or int8.
        divisors: of a group's largest and of its smallest number.

    Returns:
        Numbers and scales; a group that has no scale has infinity for one, and no numbers.
    """
    function = _function()
    if function is None:
        return None
    rows, columns = weight.shape
    numbers = np.require(weight, np.float32, ["C"])
    values = np.zeros((rows, columns), np.int8)
    scales = np.empty((rows, columns // scheme.group_size), np.float16)
    known = np.array([scheme.lowest, -scheme.lowest - 1, *divisors], np.float32)
    source, span, to_values, to_scales = (array.ctypes.data for array in (numbers, known, values, scales))
    done = function(source, scales.size, scheme.group_size, span, scheme.bits == 4, to_values, to_scales)
    return Quantized(values, scales) if done else None


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
    function.argtypes = (address, count, count, address, ctypes.c_int, address, address)
    function.restype = ctypes.c_int
    return function
