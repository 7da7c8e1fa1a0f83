"""QuantizedExpertDispatch: ExpertDispatch on dequantised experts, whatever the form of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_export.ops.expert_dispatch import expert_dispatch
from moiie_export.ops.quantized_expert_dispatch import bank_names, quantized_expert_dispatch
from moiie_export.quantize.methods import quantizer
from moiie_export.quantize.packing import pack_int4, restore
from moiie_export.quantize.scheme import Scheme

Run = Callable[..., list[np.ndarray]]
HIDDEN, INNER = 64, 128
Form = Scheme | None
"""None: float32."""
INT4, INT8, FP8 = Scheme("int4", 32), Scheme("int8", 64), Scheme("fp8")


def make(forms: list[tuple[Form, Form]], experts: list[int], tokens: int = 9, seed: int = 0) -> dict[str, Any]:
    """A node's attributes and inputs, and the same experts in float32. `forms`: of each expert's gate_up and down."""
    rng = np.random.default_rng(seed)
    case: dict[str, Any] = {"attributes": {"experts": experts}, "banks": {}, "typed": {}}
    scales: dict[str, np.ndarray] = {}
    for index, (kind, shape) in enumerate((("gate_up", (2 * INNER, HIDDEN)), ("down", (HIDDEN, INNER)))):
        case[kind] = []
        for i, form in enumerate(form[index] for form in forms):
            weight = (rng.standard_normal(shape) / 8).astype(np.float32)
            if form is None:
                case[kind].append(weight)
                case["banks"][f"{kind}_{i}"] = case["typed"][f"{kind}_{i}"] = weight
                continue
            made = quantizer("rtn", form.format)(weight, form)
            case[kind].append(restore(made, form))
            four = form.bits == 4
            case["banks"][f"{kind}_{i}"] = pack_int4(made.values) if four else made.values
            case["typed"][f"{kind}_{i}"] = made.values.astype(ml_dtypes.int4) if four else made.values
            if form == FP8:
                case["banks"][f"{kind}_{i}"] = torch.from_numpy(made.values).view(torch.float8_e4m3fn)
                case["typed"][f"{kind}_{i}"] = made.values.view(ml_dtypes.float8_e4m3fn)
            scales[f"{kind}_scales_{i}"] = made.scales
        chosen = [form[index] for form in forms]
        case["attributes"][f"{kind}_bits"] = [32 if form is None else form.bits for form in chosen]
        case["attributes"][f"{kind}_group_sizes"] = [0 if form is None else form.group_size for form in chosen]
    case["banks"] |= scales
    case["typed"] |= scales
    top_k = min(2, len(experts))
    ids = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
    case["inputs"] = {
        "hidden": rng.standard_normal((tokens, HIDDEN)).astype(np.float32),
        "expert_ids": np.array(ids, np.int32).reshape(tokens, top_k),
        "expert_weights": rng.random((tokens, top_k)).astype(np.float32),
    }
    return case


def tensors(arrays: Any) -> list[torch.Tensor]:
    return [torch.as_tensor(array) for array in arrays]


def in_torch(case: dict[str, Any]) -> np.ndarray:
    inputs, banks = tensors(case["inputs"].values()), tensors(case["banks"].values())
    return quantized_expert_dispatch(*inputs, banks, *case["attributes"].values()).numpy()


def check(run_body: Run, case: dict[str, Any]) -> None:
    assert list(case["banks"]) == bank_names(case["attributes"])
    inputs, experts = tensors(case["inputs"].values()), case["attributes"]["experts"]
    expected = expert_dispatch(*inputs, tensors(case["gate_up"]), tensors(case["down"]), experts).numpy()
    body = run_body("QuantizedExpertDispatch", case["attributes"], case["inputs"], case["typed"])[0]
    for found in (in_torch(case), body):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


FORMS = {
    "all int4": [(INT4, INT4)] * 4,
    "all int8": [(INT8, INT8)] * 4,
    "all fp8": [(FP8, FP8)] * 4,
    "one expert float32": [(INT4, INT4), (None, None), (INT4, INT4)],
    "all different": [
        (INT4, INT8),
        (Scheme("int8", 32), Scheme("int4", 128)),
        (None, FP8),
        (Scheme("int4", 64), None),
    ],
}


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_body_equals_torch_equals_dispatch_on_dequantised_experts(
    run_body: Run, forms: list[tuple[Form, Form]], tokens: int
) -> None:
    check(run_body, make(forms, [0, 2, 3, 7][: len(forms)], tokens))


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mixture_of_forms(run_body: Run, data: st.DataObject) -> None:
    form = st.sampled_from([None, FP8, *(Scheme(kind, group) for kind in ("int4", "int8") for group in (32, 64))])
    forms = data.draw(st.lists(st.tuples(form, form), min_size=1, max_size=3))
    check(run_body, make(forms, list(range(len(forms))), seed=len(forms)))


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_an_expert_that_is_not_chosen_cannot_spoil_a_token(run_body: Run, poison: float) -> None:
    case = make([(INT4, INT4), (INT4, INT4)], [0, 1])
    case["banks"]["down_scales_1"][:] = poison  # shared with `typed`
    case["inputs"]["expert_ids"][:] = 0
    for found in (
        in_torch(case),
        run_body("QuantizedExpertDispatch", case["attributes"], case["inputs"], case["typed"])[0],
    ):
        assert np.isfinite(found).all()


@pytest.mark.parametrize("forms", ["all int4", "all fp8"])
def test_weights_reach_one_dequantisation_each_and_nothing_else(
    body_model: Callable[..., onnx.ModelProto], forms: str
) -> None:
    case = make(FORMS[forms], [0, 1, 2, 3])
    model = body_model("QuantizedExpertDispatch", case["attributes"], case["inputs"], case["typed"])
    for bank in (f"{kind}_{i}" for kind in ("gate_up", "down") for i in range(4)):
        users = [(node.op_type, list(node.input).index(bank)) for node in model.functions[0].node if bank in node.input]
        assert users == [("DequantizeLinear", 0)]


def test_the_fake_agrees_with_the_op() -> None:
    case = make(FORMS["all different"], [0, 1, 2, 3])
    arguments = (*tensors(case["inputs"].values()), tensors(case["banks"].values()), *case["attributes"].values())
    # Of float8, which torch cannot compare, the fake alone is tried.
    torch.library.opcheck(quantized_expert_dispatch, arguments, test_utils="test_faketensor")
    case = make([(INT4, INT8), (None, INT4)], [0, 1])
    arguments = (*tensors(case["inputs"].values()), tensors(case["banks"].values()), *case["attributes"].values())
    torch.library.opcheck(quantized_expert_dispatch, arguments)
