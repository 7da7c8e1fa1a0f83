"""ExpertDispatch: each token through its experts and no other, in torch and in the portable body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_export.ops.expert_dispatch import expert_dispatch

Run = Callable[..., list[np.ndarray]]
HIDDEN, INNER = 8, 10


def make(tokens: int, top_k: int, experts: list[int], seed: int = 0) -> dict[str, Any]:
    """Random tokens, each routed to `top_k` different experts of the list."""
    rng = np.random.default_rng(seed)
    weights = rng.random((tokens, top_k)).astype(np.float32) + 0.1
    chosen = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
    return {
        "hidden": rng.standard_normal((tokens, HIDDEN)).astype(np.float32),
        "expert_ids": np.array(chosen, np.int32).reshape(tokens, top_k),
        "expert_weights": weights / weights.sum(axis=1, keepdims=True),
        "gate_up": [rng.standard_normal((2 * INNER, HIDDEN)).astype(np.float32) / 3 for _ in experts],
        "down": [rng.standard_normal((HIDDEN, INNER)).astype(np.float32) / 3 for _ in experts],
    }


def in_torch(case: dict[str, Any], experts: list[int]) -> np.ndarray:
    single = [torch.from_numpy(case[name]) for name in ("hidden", "expert_ids", "expert_weights")]
    lists = [[torch.from_numpy(bank) for bank in case[name]] for name in ("gate_up", "down")]
    return expert_dispatch(*single, *lists, experts).numpy()


def node_inputs(case: dict[str, Any]) -> dict[str, np.ndarray]:
    banks = {f"{name}_{i}": bank for name in ("gate_up", "down") for i, bank in enumerate(case[name])}
    return {name: case[name] for name in ("hidden", "expert_ids", "expert_weights")} | banks


def by_hand(case: dict[str, Any], experts: list[int]) -> np.ndarray:
    """Token by token, slot by slot (spec 1.7 step 6, 1.10)."""
    out = np.zeros_like(case["hidden"])
    for t, x in enumerate(case["hidden"]):
        for expert, weight in zip(case["expert_ids"][t].tolist(), case["expert_weights"][t], strict=True):
            if expert not in experts:
                continue
            bank = experts.index(expert)
            gate, up = np.split(case["gate_up"][bank] @ x, 2)
            out[t] += weight * (case["down"][bank] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def check(run_body: Run, case: dict[str, Any], experts: list[int]) -> None:
    expected = by_hand(case, experts)
    body = run_body("ExpertDispatch", {"experts": experts}, node_inputs(case))[0]
    for found in (in_torch(case, experts), body):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5, strict=True)


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 4, 8])
def test_body_equals_torch_equals_the_sum_by_hand(run_body: Run, tokens: int, top_k: int, count: int) -> None:
    experts = list(range(count))
    check(run_body, make(tokens, top_k, experts, seed=tokens + top_k), experts)


@pytest.mark.parametrize("experts", [[1, 2, 3], [0, 5, 9], [7]])
def test_ids_are_global_and_may_have_gaps(run_body: Run, experts: list[int]) -> None:
    check(run_body, make(20, min(2, len(experts)), experts), experts)


def test_all_rows_on_one_expert_and_none_on_the_others(run_body: Run) -> None:
    for expert in range(4):
        case = make(17, 1, [0, 1, 2, 3])
        case["expert_ids"][:] = expert
        check(run_body, case, [0, 1, 2, 3])


def test_a_single_row_of_a_long_sequence_on_one_expert(run_body: Run) -> None:
    case = make(300, 2, [0, 1])
    case["expert_ids"][123] = [3, 0]
    case["gate_up"].append(case["gate_up"][0] * 2)
    case["down"].append(case["down"][1] * 2)
    check(run_body, case, [0, 1, 3])


def test_a_route_to_an_expert_that_is_not_given_adds_nothing(run_body: Run) -> None:
    """A decode graph lists only what language tokens reach."""
    case = make(17, 2, [1, 2, 3])
    case["expert_ids"][::2, 1] = 0
    check(run_body, case, [1, 2, 3])
    case["expert_ids"][:] = 0
    assert not in_torch(case, [1, 2, 3]).any()
    assert not run_body("ExpertDispatch", {"experts": [1, 2, 3]}, node_inputs(case))[0].any()


def test_both_slots_on_one_expert_add_up(run_body: Run) -> None:
    """No router does that, but the sum has to hold where rows repeat."""
    case = make(9, 2, [0, 1])
    case["expert_ids"][:, 1] = case["expert_ids"][:, 0]
    check(run_body, case, [0, 1])


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_an_expert_that_is_not_chosen_cannot_spoil_a_token(run_body: Run, poison: float) -> None:
    """A dense sum would multiply its overflow by 0, which is NaN (spec 1.7)."""
    case = make(12, 2, [0, 1, 2])
    case["gate_up"].append(np.full((2 * INNER, HIDDEN), poison, np.float32))
    case["down"].append(np.full((HIDDEN, INNER), poison, np.float32))
    check(run_body, case, [0, 1, 2, 3])
    case["expert_ids"][5, 0] = 3
    for found in (
        in_torch(case, [0, 1, 2, 3]),
        run_body("ExpertDispatch", {"experts": [0, 1, 2, 3]}, node_inputs(case))[0],
    ):
        assert not np.isfinite(found[5]).all()
        assert np.isfinite(np.delete(found, 5, axis=0)).all()


def test_no_tokens(run_body: Run) -> None:
    check(run_body, make(0, 2, [0, 1, 2]), [0, 1, 2])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_routing_at_all(run_body: Run, data: st.DataObject) -> None:
    """Ids anywhere, also outside the list, weights of any sign."""
    experts = sorted(data.draw(st.sets(st.integers(0, 9), min_size=1, max_size=4)))
    tokens, top_k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    case = make(tokens, 1, experts, seed=data.draw(st.integers(0, 99)))
    ids = data.draw(st.lists(st.integers(-1, 10), min_size=tokens * top_k, max_size=tokens * top_k))
    case["expert_ids"] = np.array(ids, np.int32).reshape(tokens, top_k)
    case["expert_weights"] = np.random.default_rng(0).standard_normal((tokens, top_k)).astype(np.float32)
    check(run_body, case, experts)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_weights_reach_one_gemm_each_and_nothing_else(body_model: Callable[..., onnx.ModelProto], count: int) -> None:
    """A runtime that maps weights from a file must not cut, copy or turn them."""
    experts = list(range(count))
    case = make(2, 1, experts)
    body = body_model("ExpertDispatch", {"experts": experts}, node_inputs(case)).functions[0]
    for i in experts:
        for bank in (f"gate_up_{i}", f"down_{i}"):
            users = [(node.op_type, list(node.input).index(bank)) for node in body.node if bank in node.input]
            assert users == [("Gemm", 1)]


def test_the_fake_agrees_with_the_op() -> None:
    case = make(6, 2, [0, 1, 2])
    single = [torch.from_numpy(case[name]) for name in ("hidden", "expert_ids", "expert_weights")]
    lists = [[torch.from_numpy(bank) for bank in case[name]] for name in ("gate_up", "down")]
    torch.library.opcheck(expert_dispatch, (*single, *lists, [0, 1, 2]))
