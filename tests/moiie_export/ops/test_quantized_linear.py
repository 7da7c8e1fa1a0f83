"""QuantizedLinear: the stored numbers times their scales, in torch and in the portable body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_export.ops.quantized_linear import quantized_linear
from moiie_export.quantize.packing import dequantize, pack_int4
from moiie_export.quantize.scheme import Scheme

Run = Callable[..., list[np.ndarray]]
SCHEMES = [Scheme(kind, group) for kind in ("int4", "int8") for group in (32, 64, 128)]
PER_ROW = [Scheme("fp8"), Scheme("w8a8")]


def make(scheme: Scheme, rows: int, tokens: int, columns: int = 256, seed: int = 0) -> dict[str, np.ndarray]:
    """x and the tensors of a weight as they lie in a bundle; every stored number occurs, the ends of the range too."""
    rng = np.random.default_rng(seed)
    case = {"x": rng.standard_normal((tokens, columns)).astype(np.float32)}
    if scheme.format == "fp8":
        bits = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        case["q"] = np.where(bits & 127 == 127, 0, bits).astype(np.uint8)
    else:
        case["q"] = rng.integers(scheme.lowest, -scheme.lowest, (rows, columns)).astype(np.int8)
        case["q"][0, :2] = scheme.lowest, -scheme.lowest - 1
    if scheme.grouped:
        case["scales"] = (rng.random((rows, columns // scheme.group_size)) / 50 + 1e-4).astype(np.float16)
    else:
        case["scales"] = (rng.random(rows) / 50 + 1e-4).astype(np.float32)
    if scheme.format == "int4":
        case["q"] = pack_int4(case["q"])
    if scheme.format == "w8a8":
        case["input_scale"] = np.array([0.013], np.float32)  # some x are beyond 127 steps
    return case


def attributes(scheme: Scheme) -> dict[str, int]:
    return {"bits": scheme.bits, "group_size": scheme.group_size}


def by_hand(case: dict[str, np.ndarray], scheme: Scheme) -> np.ndarray:
    """Dequantise, then multiply in float64."""
    x = case["x"].astype(np.float64)
    if "input_scale" in case:
        step = case["input_scale"][0]
        x = np.clip(np.rint(case["x"] / step), -128, 127) * np.float64(step)
    return x @ dequantize(case["q"], case["scales"], scheme).astype(np.float64).T


def in_torch(case: dict[str, np.ndarray], scheme: Scheme) -> np.ndarray:
    q = torch.from_numpy(case["q"])
    q = q.view(torch.float8_e4m3fn) if scheme.format == "fp8" else q
    step = torch.from_numpy(case["input_scale"]) if "input_scale" in case else None
    scales = torch.from_numpy(case["scales"])
    return quantized_linear(torch.from_numpy(case["x"]), q, scales, step, scheme.bits, scheme.group_size).numpy()


def typed(case: dict[str, np.ndarray], scheme: Scheme) -> dict[str, np.ndarray]:
    """The weight's tensors as ONNX types them."""
    stored = {name: array for name, array in case.items() if name != "x"}
    if scheme.format == "int4":
        low, high = stored["q"] << 4 >> 4, stored["q"] >> 4
        stored["q"] = np.stack([low, high], axis=-1).reshape(len(low), -1).astype(ml_dtypes.int4)
    elif scheme.format == "fp8":
        stored["q"] = stored["q"].view(ml_dtypes.float8_e4m3fn)
    return stored


def check(run_body: Run, case: dict[str, np.ndarray], scheme: Scheme) -> None:
    expected = by_hand(case, scheme)
    body = run_body("QuantizedLinear", attributes(scheme), {"x": case["x"]}, typed(case, scheme))[0]
    for found in (in_torch(case, scheme), body):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("scheme", [*SCHEMES, *PER_ROW], ids=str)
def test_body_equals_torch_equals_dequantise_and_multiply(run_body: Run, scheme: Scheme, tokens: int) -> None:
    check(run_body, make(scheme, 24, tokens), scheme)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*SCHEMES, *PER_ROW]), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_any_sizes(run_body: Run, scheme: Scheme, rows: int, tokens: int, groups: int) -> None:
    columns = groups * scheme.group_size if scheme.grouped else 7 * groups
    check(run_body, make(scheme, rows, tokens, columns, seed=rows), scheme)


def test_the_low_nibble_is_the_even_column(run_body: Run) -> None:
    """The two columns of a byte have different inputs, so that the other order is another result."""
    case = {"x": np.zeros((2, 32), np.float32), "q": np.zeros((1, 16), np.int8), "scales": np.ones((1, 1), np.float16)}
    case["x"][0, 0] = case["x"][1, 1] = 1
    scheme = Scheme("int4", 32)
    case["q"][0, 0] = np.array(0xD5, np.uint8).view(np.int8)  # 0xD is -3, odd column; 5 even
    np.testing.assert_array_equal(in_torch(case, scheme), [[5], [-3]])
    check(run_body, case, scheme)


def test_a_float16_scale_does_not_round_the_product(run_body: Run) -> None:
    """5 times a float16 has more digits than a float16; the bundle's numbers are exact products."""
    scale = np.float16(0.1)
    case = {"x": np.eye(1, 32, dtype=np.float32), "q": np.zeros((1, 32), np.int8), "scales": np.full((1, 1), scale)}
    case["q"][0, 0] = 5
    exact = np.float32(5) * np.float32(scale)
    assert exact != np.float32(np.float16(exact))
    found = run_body(
        "QuantizedLinear", attributes(Scheme("int8", 32)), {"x": case["x"]}, typed(case, Scheme("int8", 32))
    )
    assert found[0][0, 0] == exact == in_torch(case, Scheme("int8", 32))[0, 0]


@pytest.mark.parametrize("scheme", [*SCHEMES[:1], *PER_ROW], ids=str)
def test_the_weight_goes_through_no_op_but_its_dequantisation(
    body_model: Callable[..., onnx.ModelProto], scheme: Scheme
) -> None:
    """Whole and untouched: a runtime maps it, and a lowering finds it."""
    case = make(scheme, 4, 2)
    stored: dict[str, Any] = typed(case, scheme)
    body = body_model("QuantizedLinear", attributes(scheme), {"x": case["x"]}, stored).functions[0]
    assert [node.op_type for node in body.node if "q" in node.input] == ["DequantizeLinear"]
    assert [(node.op_type, list(node.input).index("weight")) for node in body.node if "weight" in node.input] == [
        ("Gemm", 1)
    ]


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8", 64), *PER_ROW], ids=str)
def test_the_fake_agrees_with_the_op(scheme: Scheme) -> None:
    case = {name: torch.from_numpy(array) for name, array in make(scheme, 6, 3).items()}
    if scheme.format == "fp8":
        case["q"] = case["q"].view(torch.float8_e4m3fn)
    arguments = (case["x"], case["q"], case["scales"], case.get("input_scale"), scheme.bits, scheme.group_size)
    checks = {"test_utils": "test_faketensor"} if scheme.format == "fp8" else {}  # torch cannot compare float8
    torch.library.opcheck(quantized_linear, arguments, **checks)
