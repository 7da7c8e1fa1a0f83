"""Element types of the values of a flat graph, for passes that put casts where types meet."""

from __future__ import annotations

import onnx_ir as ir

from moiie_runtime.errors import MoiieError

_BOOL = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor", "IsNaN"})
_INT64 = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_FIXED = {
    **dict.fromkeys(_BOOL, ir.DataType.BOOL),
    **dict.fromkeys(_INT64, ir.DataType.INT64),
    **dict.fromkeys(("ModalityRouter", "DequantizeLinear"), ir.DataType.FLOAT),
}
"""Types of results that do not depend on inputs: a dequantised weight is float32 in a bundle's graph."""

_TYPE_OF_INPUT = {"Where": 1, "CastLike": 1, "OneHot": 2, "QuantizeLinear": 2}
"""Which input has the type of the result, for ops where it is not the first."""

_OUTPUTS = {"TopK": (None, ir.DataType.INT64), "TopKRoute": (ir.DataType.INT32, ir.DataType.FLOAT)}

Types = dict[ir.Value, ir.DataType]


def value_types(model: ir.Model) -> Types:
    """The element type of every value of the main graph.

    Raises:
        MoiieError: an input or a constant has none: the graph is damaged.
    """
    types: Types = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype is None:
            raise MoiieError(f"{model.graph.name}: {value.name} has no element type", "export the bundle again")
        types[value] = value.dtype
    for node in model.graph:
        for index, output in enumerate(node.outputs):
            types[output] = _output_type(node, index, types)
    return types


def _output_type(node: ir.Node, index: int, types: Types) -> ir.DataType:
    kind = node.op_type
    if kind == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if kind in _FIXED:
        return _FIXED[kind]
    if kind == "ConstantOfShape":
        value = node.attributes.get("value")
        return ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    fixed = _OUTPUTS.get(kind, ())[index : index + 1]
    if fixed and fixed[0] is not None:
        return fixed[0]
    source = node.inputs[_TYPE_OF_INPUT.get(kind, 0)]
    if source is None:
        raise MoiieError(f"node {node.name} ({kind}): its first input is left out, so its type is unknown")
    return types[source]
