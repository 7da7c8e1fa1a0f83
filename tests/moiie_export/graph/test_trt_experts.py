"""Banks of a layer whose experts are stored in several forms: one node a form, named alike in every phase."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import pytest

from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_experts import lower_experts
from moiie_export.ops import DOMAIN
from moiie_export.ops.op import OPSET
from moiie_export.quantize.scheme import Scheme
from tests.trt_graphs import target

HIDDEN, INNER, LANGUAGE = 64, 32, (1, 2, 3)
FP8, INT8, INT4 = Scheme("fp8"), Scheme("int8", 32), Scheme("int4", 32)
STORED = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
Forms = Mapping[int, Scheme]


def stored(name: str, dtype: ir.DataType, *shape: int) -> ir.Value:
    """A weight of a bundle; nothing reads its bytes."""
    tensor = ir.ExternalTensor("weights", 0, 0, dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def lowered(forms: Forms, banks: str = "inputs") -> tuple[list[ir.Node], TrtContext]:
    """The nodes of a layer with these experts, and what became inputs."""
    weights, scales, attributes = [], [], {"experts": list(forms)}
    for kind, rows, columns in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
        attributes |= {
            f"{kind}_bits": [form.bits for form in forms.values()],
            f"{kind}_group_sizes": [form.group_size for form in forms.values()],
        }
        for expert, form in forms.items():
            name = f"decoder.layers.1.mlp.experts.{expert}.{kind}_proj"
            weights.append(stored(name, STORED[form.format], rows, columns))
            shape = (rows, columns // form.group_size) if form.grouped else (rows,)
            dtype = ir.DataType.FLOAT16 if form.grouped else ir.DataType.FLOAT
            scales.append(stored(f"{name}.scales", dtype, *shape))
    rows = [ir.Value(name=name) for name in ("hidden", "expert_ids", "expert_weights")]
    node = ir.node("QuantizedExpertDispatch", [*rows, *weights, *scales], attributes=attributes, domain=DOMAIN)
    graph = ir.Graph(
        rows,
        node.outputs,
        nodes=[node],
        initializers=[*weights, *scales],
        opset_imports={"": OPSET, DOMAIN: 1},
        name="g",
    )
    model = ir.Model(graph, ir_version=10)
    context = TrtContext("decoder", target("rtx", plugins="required", banks=banks), {1: LANGUAGE})
    lower_experts(model, context)
    return [each for each in graph if each.domain == DOMAIN and each is not node], context


MIXTURES: dict[str, Forms] = {
    "one form": dict.fromkeys((0, *LANGUAGE), FP8),
    "vision experts apart": {0: FP8, **dict.fromkeys(LANGUAGE, INT4)},
    "language experts in two forms": {0: INT8, 1: FP8, 2: INT8, 3: FP8},
    "vision experts in two forms": {0: FP8, **dict.fromkeys(LANGUAGE, INT8), 4: INT4},
}


@pytest.mark.parametrize("forms", MIXTURES.values(), ids=MIXTURES)
def test_both_phases_bind_the_same_banks(forms: Forms) -> None:
    nodes, prefill = lowered(forms)
    _, decode = lowered({expert: form for expert, form in forms.items() if expert in LANGUAGE})
    experts = {name: bank.experts for bank in prefill.banks for name in bank.tensors}
    names = [name for bank in prefill.banks for name in bank.tensors]
    assert sorted(names) == sorted(set(names))
    assert {bank.name for bank in decode.banks} == {"language"}
    for bank in decode.banks:
        assert {experts[name] for name in bank.tensors} == {bank.experts}
    wanted = {"fp8": "Fp8ExpertDispatch"}
    for node in nodes:
        (form,) = {forms[expert] for expert in node.attributes["experts"].as_ints()}
        assert node.op_type == wanted.get(form.format, "QuantizedExpertDispatch")
        assert ("bits" in node.attributes) == form.grouped


@pytest.mark.parametrize("forms", MIXTURES.values(), ids=MIXTURES)
def test_constants_have_names_of_their_own(forms: Forms) -> None:
    nodes, context = lowered(forms, banks="constants")
    assert not context.banks
    names = [str(value.name) for node in nodes for value in node.inputs[3:] if value is not None]
    assert sorted(names) == sorted(set(names))
    assert sorted(expert for node in nodes for expert in node.attributes["experts"].as_ints()) == sorted(forms)
