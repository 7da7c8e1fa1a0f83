from __future__ import annotations

import numpy as np
import pytest

from moiie_runtime.errors import MoiieError
from moiie_runtime.routing import LayerRouting, Routing, RoutingStats


def layer(ids, weights):
    return LayerRouting(np.array(ids, np.int32), np.array(weights, np.float32))


@pytest.fixture
def routing() -> Routing:
    return Routing(
        token_modality=np.array([0, 1, 1], np.int32),
        prefill={1: layer([[1, 3], [0, 2], [0, 1]], [[0.75, 0.25], [0.5, 0.5], [0.875, 0.125]])},
        decode={1: layer([[3, 1]], [[0.625, 0.375]])},
        num_experts=4,
    )


def test_counts_and_weights_by_hand(routing):
    stats = routing.stats()
    language, vision = stats.counts[0].T
    assert language.tolist() == [0, 2, 0, 2]
    assert vision.tolist() == [2, 1, 1, 0]
    assert stats.weight_sums[0].T.tolist() == [[0, 1.125, 0, 0.875], [1.375, 0.125, 0.5, 0]]
    assert stats.counts.sum() == 4 * 2


def test_rows_for_a_table(routing):
    rows = routing.stats().rows()
    assert len(rows) == 1 * 2 * 4
    assert {"layer": 1, "modality": "vision", "expert": 0, "tokens": 2, "mean_weight": 0.6875} in rows
    assert {"layer": 1, "modality": "language", "expert": 0, "tokens": 0, "mean_weight": 0.0} in rows


def test_statistics_add_up(routing):
    double = routing.stats() + routing.stats()
    np.testing.assert_array_equal(double.counts, 2 * routing.stats().counts)
    np.testing.assert_array_equal(double.weight_sums, 2 * routing.stats().weight_sums)
    other = RoutingStats((3,), double.counts, double.weight_sums)
    with pytest.raises(MoiieError, match="two different models"):
        double + other
