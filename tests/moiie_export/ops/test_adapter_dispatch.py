"""AdapterDispatch: the chosen adapters of a request, in torch and in the portable body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from moiie_export.ops import OPS
from moiie_export.ops.adapter_dispatch import adapter_dispatch

Run = Callable[..., list[np.ndarray]]
Inputs = dict[str, np.ndarray]


def make(rows: int, tokens: int, adapters: int, hidden: int = 6, bottleneck: int = 4, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    shapes = {
        "hidden": (rows, tokens, hidden),
        "down": (adapters, bottleneck, hidden),
        "down_bias": (adapters, bottleneck),
        "up": (adapters, hidden, bottleneck),
        "up_bias": (adapters, hidden),
        "scale": (adapters,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def in_torch(inputs: Inputs) -> np.ndarray:
    return adapter_dispatch(*(torch.from_numpy(value) for value in inputs.values())).numpy()


def by_hand(inputs: Inputs) -> np.ndarray:
    """Equation (8), row by row in float64."""
    out = np.zeros_like(inputs["hidden"])
    for row, x in enumerate(inputs["hidden"].astype(np.float64)):
        adapter = row if len(inputs["scale"]) > 1 else 0
        inner = np.maximum(x @ inputs["down"][adapter].T + inputs["down_bias"][adapter], 0)
        out[row] = inputs["scale"][adapter] * (inner @ inputs["up"][adapter].T + inputs["up_bias"][adapter])
    return out


def check(run_body: Run, inputs: Inputs) -> None:
    expected = by_hand(inputs)
    for found in (in_torch(inputs), run_body("AdapterDispatch", {}, inputs)[0]):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5, strict=True)


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize(("rows", "adapters"), [(1, 1), (5, 1), (2, 2), (5, 5)])
def test_body_equals_torch_equals_the_equation(run_body: Run, rows: int, tokens: int, adapters: int) -> None:
    check(run_body, make(rows, tokens, adapters))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 4),
    tokens=st.integers(1, 6),
    own=st.booleans(),
    hidden=st.integers(1, 9),
    bottleneck=st.integers(1, 5),
)
def test_any_sizes(run_body: Run, rows: int, tokens: int, own: bool, hidden: int, bottleneck: int) -> None:
    check(run_body, make(rows, tokens, rows if own else 1, hidden, bottleneck, seed=rows))


@pytest.mark.parametrize("tokens", [1, 7])
def test_one_adapter_for_all_rows_equals_a_copy_for_each(run_body: Run, tokens: int) -> None:
    """A request's beams share its adapter."""
    shared = make(3, tokens, 1)
    copied = {name: value if name == "hidden" else value.repeat(3, axis=0) for name, value in shared.items()}
    for run in (in_torch, lambda inputs: run_body("AdapterDispatch", {}, inputs)[0]):
        np.testing.assert_allclose(run(shared), run(copied), atol=1e-6)


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_the_gathered_adapter_equals_the_one_hot_sum_over_all(run_body: Run, experts: int) -> None:
    """Equation (9) as the authors compute it: all adapters, weighted by a one-hot row a sentence."""
    rows, tokens = 4, 5
    bank = make(1, tokens, experts, seed=experts)
    hidden = make(rows, tokens, 1, seed=9)["hidden"]
    chosen = np.arange(rows) % experts
    one_hot = np.eye(experts, dtype=np.float32)[chosen]
    dense = np.zeros_like(hidden)
    for expert in range(experts):
        single = {name: value[expert : expert + 1] for name, value in bank.items() if name != "hidden"}
        dense += one_hot[:, expert, None, None] * by_hand({"hidden": hidden, **single})
    gathered = {"hidden": hidden, **{name: value[chosen] for name, value in bank.items() if name != "hidden"}}
    check(run_body, gathered)
    np.testing.assert_allclose(in_torch(gathered), dense, atol=1e-5)


def test_neither_one_adapter_nor_one_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="2 adapters for 3 rows"):
        in_torch(make(3, 2, 2))


def test_no_weight_is_transposed() -> None:
    """Activations are, twice; a weight that is mapped from a file stays where it lies."""
    function = onnx.parser.parse_function(OPS["AdapterDispatch"].body({}, 6))
    transposed = [node.input[0] for node in function.node if node.op_type == "Transpose"]
    assert transposed == ["hidden", "scaled"]
    products = [node.input[0] for node in function.node if node.op_type == "MatMul"]
    assert products == ["down", "up"]


def test_the_body_in_the_reference_evaluator(body_model: Callable[..., onnx.ModelProto]) -> None:
    inputs = make(3, 4, 3)
    np.testing.assert_allclose(
        ReferenceEvaluator(body_model("AdapterDispatch", {}, inputs)).run(None, inputs)[0],
        by_hand(inputs),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("adapters", [1, 3])
def test_the_fake_agrees_with_the_op(adapters: int) -> None:
    torch.library.opcheck(adapter_dispatch, tuple(torch.from_numpy(v) for v in make(3, 4, adapters).values()))
