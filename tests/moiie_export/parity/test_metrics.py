"""Distances: what counts as different, and what never passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from moiie_export.parity.metrics import MARGIN_EDGES, dense_weights, error, margin_histogram, non_finite, same_experts
from moiie_export.parity.report import judge

FLOATS = hn.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32))


@given(FLOATS)
def test_equal_arrays_do_not_differ(array: np.ndarray) -> None:
    assert error(array, array.copy()).value == 0


@given(FLOATS, st.integers(0, 2), st.integers(0, 3), st.floats(1, 50))
def test_the_largest_difference_is_found_on_the_references_scale(
    array: np.ndarray, row: int, column: int, step: float
) -> None:
    changed = array.copy()
    changed[row, column] += np.float32(step)
    found = error(changed, array)
    assert found.row == row
    difference = abs(changed[row, column] - array[row, column])
    assert found.value == pytest.approx(difference / max(1.0, np.abs(array).max()), rel=1e-5)


@pytest.mark.parametrize(("actual", "expected"), [(np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan)])
def test_nan_never_passes(actual: float, expected: float) -> None:
    found = error(np.array([[0.0], [actual]]), np.array([[0.0], [expected]]))
    assert np.isnan(found.value)
    assert not judge("logits", "error", found.value, 1e9).passed
    assert not judge("routing", "agreement", found.value, 0.0).passed


def test_minus_infinity_equals_only_itself() -> None:
    lowest = -np.inf
    expected = np.array([[lowest, 2.0]])
    assert error(np.array([[lowest, 2.0]]), expected).value == 0
    for other in (-1e30, 0.0, np.inf):
        assert error(np.array([[other, 2.0]]), expected).value > 1e9
    assert error(np.array([[lowest, 2.0]]), np.array([[-1e30, 2.0]])).value == np.inf


def test_other_shapes_are_an_error_of_ours() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        error(np.zeros((2, 1)), np.zeros((1, 2)))


def test_nothing_to_compare() -> None:
    found = error(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (found.value, found.row) == (0.0, None)


def test_non_finite_numbers_are_counted() -> None:
    array = np.array([1.0, np.nan, np.inf, -np.inf])
    assert (non_finite(array), non_finite(array, minus_infinity=True)) == (3, 2)


def test_experts_are_sets() -> None:
    assert same_experts(np.array([[2, 1], [0, 1]]), np.array([[1, 2], [0, 2]])).tolist() == [True, False]


def test_weights_are_compared_by_expert() -> None:
    first = dense_weights(np.array([[2, 0]]), np.array([[0.7, 0.3]]), 3)
    second = dense_weights(np.array([[0, 2]]), np.array([[0.3, 0.7]]), 3)
    assert np.array_equal(first, second)
    assert np.isnan(dense_weights(np.array([[3, 0]]), np.array([[0.7, 0.3]]), 3)).all()


def test_margin_histogram_counts_every_margin() -> None:
    margins = np.array([0.0, 5e-9, 2e-5, 0.3, 1.0])
    counts = margin_histogram(margins)
    assert len(counts) == len(MARGIN_EDGES) - 1
    assert sum(counts) == len(margins)
    assert (counts[0], counts[-1]) == (2, 1)
