"""Distances between two arrays, and how near a router's decisions were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MARGIN_EDGES = (0.0, *(float(f"1e{power}") for power in range(-8, 0)), 0.2, 0.5, 1.0)
"""Bins of the histogram of router margins: the gap between the k-th and the next probability."""


@dataclass(frozen=True)
class Error:
    """A relative error and the row where it is largest.

    Attributes:
        value: max|difference| / max(1, max|reference|); NaN when either side holds NaN.
        row: index along the first axis; None when there was nothing to compare.
        step: decode step, when several were compared.
    """

    value: float
    row: int | None = None
    step: int | None = None

    def worse(self, other: Error) -> bool:
        """Whether this is the larger error; NaN is larger than anything."""
        return bool(np.isnan(self.value)) or self.value > other.value


def error_by_row(actual: Array, expected: Array) -> Array:
    """The error of each row (first axis), all on the scale of the whole reference.

    Equal infinities do not differ: a router's -inf equals -inf, and nothing else does.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {actual.shape} and {expected.shape} cannot be compared")
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(1.0, float(finite.max(initial=0.0)))
    with np.errstate(invalid="ignore"):
        difference = np.where(actual == expected, 0.0, np.abs(actual - expected))
    rows: Array = difference.max(axis=tuple(range(1, difference.ndim)), initial=0.0) / scale
    return rows


def error(actual: Array, expected: Array) -> Error:
    """The largest error over all rows."""
    rows = error_by_row(actual, expected)
    if not len(rows):
        return Error(0.0)
    worst = int(rows.argmax())  # the first NaN when there is one
    return Error(float(rows[worst]), worst)


def non_finite(array: Array, *, minus_infinity: bool = False) -> int:
    """How many elements are NaN or infinite; -inf is allowed where a router says so."""
    bad = ~np.isfinite(array)
    if minus_infinity:
        bad &= ~np.isneginf(array)
    return int(bad.sum())


def same_experts(first: Array, second: Array) -> Array:
    """Whether two choices [..., k] of experts are the same sets, whatever their order."""
    same: Array = (np.sort(first, axis=-1) == np.sort(second, axis=-1)).all(axis=-1)
    return same


def dense_weights(expert_ids: Array, expert_weights: Array, num_experts: int) -> Array:
    """Weights [T, k] of chosen experts as one column for each expert, [T, E]; ids out of range become NaN rows."""
    dense = np.zeros((len(expert_ids), num_experts), np.float32)
    outside = ((expert_ids < 0) | (expert_ids >= num_experts)).any(axis=1)
    np.put_along_axis(dense, np.clip(expert_ids, 0, num_experts - 1).astype(np.int64), expert_weights, axis=1)
    dense[outside] = np.nan
    return dense


def margin_histogram(margins: Array) -> list[int]:
    """Counts of router margins in the bins of `MARGIN_EDGES`."""
    return [int(count) for count in np.histogram(margins, MARGIN_EDGES)[0]]
