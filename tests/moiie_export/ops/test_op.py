"""The records of the custom ops: schema, translation, torch op and body say the same."""

from __future__ import annotations

import re

import onnx
import onnx.parser
import pytest
import torch
from onnx import defs, helper

from moiie_export.graph.translation import register_schemas, translation_table
from moiie_export.ops import DOMAIN, OPS
from moiie_export.ops.op import OPSET, VERSION, Op, function_text, scalar, vector

EXAMPLES = {
    "AdapterDispatch": [({}, 6)],
    "CachedAttention": [({"num_key_value_heads": 2, "local_window_size": window}, 6) for window in (0, 5)],
    "DeformableSample": [({}, 4)],
    "ExpertDispatch": [({"experts": list(range(n))}, 3 + 2 * n) for n in (1, 2, 8)],
    "ModalityRouter": [
        ({"language_experts": [1, 2], "vision_experts": [0, 1], "num_experts": 4}, inputs) for inputs in (2, 4)
    ],
    "QuantizedExpertDispatch": [
        (
            {
                "experts": [0, 3],
                "gate_up_bits": bits,
                "gate_up_group_sizes": [32, 32],
                "down_bits": [8, 8],
                "down_group_sizes": [64, 128],
            },
            inputs,
        )
        for bits, inputs in (([4, 8], 11), ([4, 32], 10), ([32, 32], 9))
    ],
    "QuantizedLinear": [({"bits": 4, "group_size": 32}, 3), ({"bits": 8, "group_size": 0}, 4)],
    "TopKRoute": [({"top_k": k}, 1) for k in (1, 2)],
}


def checker_context() -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 10, {"": OPSET, DOMAIN: VERSION}
    return context


def test_every_op_is_known_by_its_own_name() -> None:
    assert set(OPS) == set(EXAMPLES)
    assert all(name == op.name for name, op in OPS.items())
    snake = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower().replace("top_k", "topk") for name in OPS}
    assert {op.torch_name for op in OPS.values()} == {f"moiie::{name}" for name in snake}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_schema_is_generated_from_the_record(op: Op) -> None:
    register_schemas()
    register_schemas()
    schema = defs.get_schema(op.name, VERSION, DOMAIN)
    option = defs.OpSchema.FormalParameterOption
    assert [port.name for port in op.inputs] == [formal.name for formal in schema.inputs]
    assert [{*port.type.split("|")} for port in op.inputs] == [{*formal.types} for formal in schema.inputs]
    assert [port.variadic and "|" in port.type for port in op.inputs] == [not f.is_homogeneous for f in schema.inputs]
    kinds = [option.Variadic if p.variadic else option.Optional if p.optional else option.Single for p in op.inputs]
    assert kinds == [formal.option for formal in schema.inputs]
    assert [(port.name, port.type) for port in op.outputs] == [(out.name, out.type_str) for out in schema.outputs]
    found = {
        name: (str(attribute.type).rsplit(".", 1)[-1], attribute.required)
        for name, attribute in schema.attributes.items()
    }
    assert found == {name: (kind.upper(), True) for name, kind in op.attributes.items()}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_torch_op_takes_the_records_arguments_in_order(op: Op) -> None:
    namespace, name = op.torch_name.split("::")
    overload = getattr(getattr(torch.ops, namespace), name).default
    assert tuple(argument.name for argument in overload._schema.arguments) == op.torch_arguments
    assert len(overload._schema.returns) == len(op.outputs)
    assert set(op.attributes) <= set(op.torch_arguments)
    assert {port.name for port in op.inputs if not port.variadic} <= set(op.torch_arguments)
    assert overload in translation_table()


@pytest.mark.parametrize(
    ("name", "attributes", "inputs"), [(name, *each) for name, all_ in EXAMPLES.items() for each in all_]
)
def test_a_body_is_a_function_of_standard_ops(name: str, attributes: dict[str, object], inputs: int) -> None:
    op = OPS[name]
    function = onnx.parser.parse_function(op.body(attributes, inputs))
    assert (function.domain, function.name, len(function.input)) == (DOMAIN, name, inputs)
    assert set(function.attribute) == set(attributes) == set(op.attributes)
    assert list(function.output) == [port.name for port in op.outputs]
    fixed = [port.name for port in op.inputs if not port.variadic][: len(function.input)]
    assert list(function.input)[: len(fixed)] == fixed
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", OPSET)]
    assert {node.domain for node in function.node} == {""}
    assert not {node.op_type for node in function.node} & {"If", "Loop", "Scan", "SequenceEmpty", "SplitToSequence"}
    written = [output for node in function.node for output in node.output]
    assert len(written) == len(set(written))
    read = {value for node in function.node for value in node.input} | set(function.output)
    assert set(function.input) <= read
    dead = set(written) - read
    assert dead <= {"highest"}, "a statement that nothing reads"
    onnx.checker.check_function(function, checker_context())


def test_the_checker_misses_an_attribute() -> None:
    """Proof that the schemas matter: with them the checker knows the ops of the domain."""
    register_schemas()
    node = helper.make_node("TopKRoute", ["logits"], ["ids", "weights"], domain=DOMAIN)
    with pytest.raises(onnx.checker.ValidationError, match="top_k"):
        onnx.checker.check_node(node, checker_context())


def test_text_of_a_function() -> None:
    lines = vector("axes", [2, -1]) + scalar("one", 1) + "\n    y = Identity (x)"
    function = onnx.parser.parse_function(function_text("Thing", (["x"], ["y"]), {"a": 1, "b": [2]}, lines))
    assert (function.name, list(function.input), list(function.output), list(function.attribute)) == (
        "Thing",
        ["x"],
        ["y"],
        ["a", "b"],
    )
    axes, one = (helper.get_attribute_value(node.attribute[0]) for node in function.node[:2])
    assert (list(axes.dims), list(onnx.numpy_helper.to_array(axes))) == ([2], [2, -1])
    assert (list(one.dims), onnx.numpy_helper.to_array(one).item()) == ([], 1)
    plain = onnx.parser.parse_function(function_text("Thing", (["x"], ["y"]), {}, "y = Identity (x)"))
    assert list(plain.attribute) == []
