"""The work of writing weights, cut into units that any thread can do in any order, each a block of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from moiie_export.quantize.methods import quantizer
from moiie_export.quantize.packing import INPUT_SCALE, Array, stored_arrays
from moiie_export.quantize.rounding import can_round, round_stored
from moiie_export.quantize.rules import Form
from moiie_export.quantize.statistics import InputStatistics
from moiie_export.source import ModelSource
from moiie_export.weights import Part, Weight
from moiie_export.weights_file import WeightsFile
from moiie_runtime.errors import MoiieError

BLOCK = 1 << 20
"""Elements of a block. Large enough that starting it costs nothing, small enough for many at a time."""
PIECE = 1 << 18
"""Elements of a block that are read, rounded and written at a time: in float32 they stay in a core's own cache."""
CALIBRATED_BLOCK = 1 << 26
"""The same for methods that have much to do once for any number of rows."""

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a part.

    Attributes:
        weight: the bundle tensor they belong to.
        parameter: the model parameter.
        part: where they come from.
        start, stop: which rows of the part.
        first: elements of the weight before them.
    """

    weight: Weight
    parameter: str
    part: Part
    start: int
    stop: int
    first: int

    @property
    def elements(self) -> int:
        """How many numbers."""
        return (self.stop - self.start) * prod(self.part.shape[1:])

    @property
    def first_row(self) -> int:
        """Rows of the parameter before them."""
        start, _ = self.weight.parameters()[self.parameter]
        return (self.first - start) // max(1, prod(self.part.shape[1:]))

    def pieces(self, elements: int) -> Iterator[Unit]:
        """The same rows in order, about so many numbers at a time."""
        inner = prod(self.part.shape[1:])
        step = max(1, elements // max(1, inner))
        for start in range(self.start, self.stop, step):
            first = self.first + (start - self.start) * inner
            yield replace(self, start=start, stop=min(self.stop, start + step), first=first)


def units_of(weight: Weight, block: int) -> Iterator[Unit]:
    """The units of a weight in order, of about `block` elements each."""
    ends = sorted((start + prod(shape), name) for name, (start, shape) in weight.parameters().items())
    position = 0
    for part in weight.parts:
        parameter = next(name for end, name in ends if position < end)
        inner, rows = prod(part.shape[1:]), part.used_shape[0]
        step = max(1, block // max(1, inner))
        for start in range(0, rows, step):
            yield Unit(weight, parameter, part, start, min(rows, start + step), position + start * inner)
        position += rows * inner


def write_plain(unit: Unit, rows: Float32, form: Form, file: WeightsFile) -> None:
    """Write the unit's rows as floats.

    Raises:
        MoiieError: a number that float16 cannot hold.
    """
    file.write(unit.weight.name, unit.first, rows if form.format == "float32" else to_float16(rows, unit.weight.name))


def to_float16(block: Float32, name: str) -> npt.NDArray[np.float16]:
    """The block in float16.

    Raises:
        MoiieError: naming the largest number when one does not fit.
    """
    with np.errstate(over="ignore"):
        stored = block.astype(np.float16)
    if not np.isfinite(stored).all():
        worst = float(np.abs(block).max())
        raise MoiieError(f"{name}: {worst:g} does not fit float16 (at most 65504)", "export with --dtype float32")
    return stored


def needs_torch(form: Form) -> bool:
    """Whether writing a weight takes torch."""
    return form.scheme is not None and not (_is_rounded(form) and can_round())


def _is_rounded(form: Form) -> bool:
    return form.method == "rtn" and form.scheme is not None and form.scheme.grouped


def write_stored(unit: Unit, source: ModelSource, form: Form, file: WeightsFile) -> bool:
    """Write the unit's rows rounded to nearest, straight from the checkpoint's numbers.

    Returns:
        Whether that was possible; nothing is written where it was not, and the longer way also tells what is wrong.
    """
    if form.scheme is None or not _is_rounded(form):
        return False
    rows = source.stored_rows(unit.part, unit.start, unit.stop)
    if rows.dtype not in (np.float32, np.uint16):
        rows = source.part_rows(unit.part, unit.start, unit.stop)
    arrays = round_stored(rows, form.scheme)
    if arrays is None:
        return False
    _write_arrays(unit, arrays, rows.shape, file)
    return True


def write_quantized(
    unit: Unit, rows: Float32, form: Form, file: WeightsFile, statistics: InputStatistics | None
) -> str:
    """Quantise the unit's rows and write numbers and scales.

    Returns:
        Why they were not quantised as asked for, or "".

    Raises:
        MoiieError: a scale that float16 cannot hold.
    """
    assert form.scheme is not None
    assert form.method is not None
    result = quantizer(form.method, form.format)(rows, form.scheme, statistics, name=unit.parameter)
    _write_arrays(unit, stored_arrays(result, form.scheme), rows.shape, file)
    return result.note


def _write_arrays(unit: Unit, arrays: Mapping[str, Array], shape: tuple[int, ...], file: WeightsFile) -> None:
    """The tensors of a quantised block of rows [rows, columns]."""
    rows, columns = shape
    first = unit.first // columns
    for suffix, array in arrays.items():
        per_row = 0 if suffix == INPUT_SCALE else array.size // rows
        file.write(unit.weight.name + suffix, first * per_row, array)
