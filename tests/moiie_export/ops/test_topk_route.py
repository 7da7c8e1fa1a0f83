"""TopKRoute: what is chosen and how it is weighed, in torch and in the portable body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_export.ops.topk_route import topk_route

Run = Callable[..., list[np.ndarray]]
INF = float("inf")


def route(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    ids, weights = topk_route(torch.from_numpy(logits), top_k)
    return ids.numpy(), weights.numpy()


def random_logits(tokens: int, experts: int, hidden: int = 0, seed: int = 0) -> np.ndarray:
    """[T, E] without ties; `hidden` experts per row at -inf."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, experts)).astype(np.float32) * 3
    for row in logits:
        row[rng.permutation(experts)[:hidden]] = -np.inf
    return logits


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden"), [(2, 1, 0), (3, 2, 1), (4, 2, 1), (8, 3, 2), (8, 3, 5), (5, 5, 0)]
)
def test_body_equals_torch(run_body: Run, tokens: int, experts: int, top_k: int, hidden: int) -> None:
    logits = random_logits(tokens, experts, hidden)
    ids, weights = route(logits, top_k)
    body_ids, body_weights = run_body("TopKRoute", {"top_k": top_k}, {"logits": logits})
    np.testing.assert_array_equal(body_ids, ids, strict=True)
    np.testing.assert_allclose(body_weights, weights, atol=1e-6, strict=True)
    assert np.isfinite(np.take_along_axis(logits, ids.astype(np.int64), axis=1)).all()


def test_by_hand() -> None:
    ids, weights = route(np.array([[0.0, np.log(3), -INF, np.log(2)]], np.float32), 2)
    assert ids.tolist() == [[1, 3]]
    assert ids.dtype == np.int32
    np.testing.assert_allclose(weights, [[0.6, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(
        route(np.array([[1.0, 2.0, 4.0]], np.float32), 2)[1][0, 0], 1 / (1 + np.exp(-2.0)), rtol=1e-6
    )


@settings(deadline=None)
@given(st.data())
def test_weights_are_the_softmax_over_the_chosen_logits(data: st.DataObject) -> None:
    """The identity of spec 1.7; chosen are the largest, whatever their size."""
    experts = data.draw(st.integers(1, 8))
    top_k = data.draw(st.integers(1, experts))
    row = data.draw(st.lists(st.floats(-500, 500, width=32), min_size=experts, max_size=experts, unique=True))
    logits = np.array([row], np.float32)
    ids, weights = route(logits, top_k)
    assert ids[0].tolist() == np.argsort(-logits[0], kind="stable")[:top_k].tolist()
    chosen = np.sort(logits[0].astype(np.float64))[::-1][:top_k]
    expected = np.exp(chosen - chosen[0]) / np.exp(chosen - chosen[0]).sum()
    np.testing.assert_allclose(weights[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", [[-INF, 200, 0, -1], [-INF, -1, 0, 200], [0, 200, -1, -INF], [-INF, 1e30, -1e30, 0]])
def test_an_unreachable_expert_is_not_chosen_where_probabilities_underflow(run_body: Run, row: list[float]) -> None:
    """Beside a logit larger by 104 all float32 probabilities are 0, those of experts at -inf included."""
    logits = np.array([row], np.float32)
    allowed = {e for e, value in enumerate(row) if value > -INF}
    for top_k in (2, 3):
        body = run_body("TopKRoute", {"top_k": top_k}, {"logits": logits})
        for ids, weights in (route(logits, top_k), (body[0], body[1])):
            assert set(ids[0].tolist()) <= allowed
            assert ids[0].tolist() == np.argsort(-logits[0], kind="stable")[:top_k].tolist()
            assert weights[0].tolist() == [1.0] + [0.0] * (top_k - 1)


def test_the_fake_agrees_with_the_op() -> None:
    torch.library.opcheck(topk_route, (torch.from_numpy(random_logits(5, 4)), 2))


def test_no_tokens(run_body: Run) -> None:
    logits = np.zeros((0, 4), np.float32)
    expected: list[Any] = list(route(logits, 2))
    for found, wanted in zip(run_body("TopKRoute", {"top_k": 2}, {"logits": logits}), expected, strict=True):
        assert found.shape == wanted.shape == (0, 2)
