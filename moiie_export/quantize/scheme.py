"""The forms a quantised weight can have, and which row lengths each one fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moiie_runtime.errors import MoiieError

GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale in the weight-only formats; kernels exist for these."""

_BITS: Mapping[str, int] = {"int4": 4, "int8": 8, "fp8": 8, "w8a8": 8}
FORMATS = tuple(_BITS)
GROUPED = ("int4", "int8")
"""Formats with a scale per group of columns; the others have one per row."""
WEIGHT_ONLY = ("int4", "int8", "fp8")
"""Formats that leave activations alone. Experts have no others: theirs are not rounded inside the kernels."""


@dataclass(frozen=True)
class Scheme:
    """How one weight [..., N, K] is stored.

    Attributes:
        format: int4 or int8 (weight only, symmetric, float16 scale per group), fp8 (E4M3, float32 scale per row) or
            w8a8 (int8, float32 scale per row, and one for the activations).
        group_size: columns per scale, 32, 64 or 128; 0 for the formats with a scale per row.

    Raises:
        MoiieError: no such format, or a group size that the format does not have.
    """

    format: str
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.format not in _BITS:
            raise MoiieError(f"format {self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.grouped and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise MoiieError(f"group_size {self.group_size} for {self.format}: expected one of {sizes}")
        if not self.grouped and self.group_size:
            raise MoiieError(
                f"group_size {self.group_size} for {self.format}: it has one scale per row", "leave group_size out"
            )

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return _BITS[self.format]

    @property
    def grouped(self) -> bool:
        """Whether a scale belongs to a group of columns; otherwise it belongs to a row."""
        return self.format in GROUPED

    @property
    def lowest(self) -> int:
        """The lowest stored value of an integer format; the highest is `-lowest - 1`."""
        return -(1 << (self.bits - 1))

    def check_row(self, columns: int, name: str) -> None:
        """Refuse rows that do not divide into groups.

        Args:
            columns: K, the length of a row.
            name: the tensor, for the message.

        Raises:
            MoiieError: naming the tensor, the row length and the groups that divide it.
        """
        if not self.grouped or (columns and columns % self.group_size == 0):
            return
        fitting = [size for size in GROUP_SIZES if columns and columns % size == 0]
        if fitting:
            hint = f"groups that divide it: {', '.join(map(str, fitting))}"
        else:
            hint = f"none of {', '.join(map(str, GROUP_SIZES))} divides it: keep this tensor in float16 or float32"
        raise MoiieError(f"{name}: rows of {columns} do not divide into groups of {self.group_size}", hint)

    def groups(self, columns: int) -> int:
        """Scales per row of K columns."""
        return columns // self.group_size if self.grouped else 1
