"""What TensorRT 10 takes of standard ONNX: a list of ops, each with its element types and with what it wants as constants.

Read, for each op: its importer in onnx-tensorrt's release 10.3 and that release's table of operators (docs/operators.md);
where the importer asks for nothing, what TensorRT's documents say of the layer. 10.13 takes no less. Graphs held to it were
never parsed by 10.3 here; the parsers of TensorRT for RTX 1.4 (older than TensorRT 11) to 1.7 take them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from moiie_export.graph.trt_types import Types

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_WHOLE = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_TRUTH = frozenset({ir.DataType.BOOL})
_NUMBERS = _FLOATS | _WHOLE
_ALL = _NUMBERS | _TRUTH
_STORED = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN})

TRT10_TYPES: Mapping[str, frozenset[ir.DataType]] = {
    **dict.fromkeys(("AveragePool", "Clip", "Conv", "Cos", "CumSum", "Floor", "Gelu", "Gemm"), _FLOATS),
    **dict.fromkeys(("LayerNormalization", "MatMul", "Pow", "QuantizeLinear", "Reciprocal", "Resize"), _FLOATS),
    **dict.fromkeys(("Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"), _FLOATS),
    **dict.fromkeys(("Abs", "Add", "ArgMax", "Div", "Equal", "Greater", "GreaterOrEqual", "Less"), _NUMBERS),
    **dict.fromkeys(("LessOrEqual", "Mod", "Mul", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"), _NUMBERS),
    **dict.fromkeys(("Relu", "ScatterND", "Sub", "TopK"), _NUMBERS),
    **dict.fromkeys(("Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape"), _ALL),
    **dict.fromkeys(("Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"), _ALL),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), _TRUTH),
    "Cast": _ALL | {ir.DataType.INT8},
    "DequantizeLinear": _STORED,
    "Range": _WHOLE | {ir.DataType.FLOAT},
}
"""op -> types of what it computes with: its first input, and the second of Where."""

_CONSTANTS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("CumSum", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Squeeze", "Unsqueeze"), (1,)),
    "DequantizeLinear": (1, 2),
    "QuantizeLinear": (1, 2),
}
"""op -> inputs that have to be initialisers."""

_BLOCKS = ir.DataType.INT4
"""The only type that DequantizeLinear takes in blocks."""


def refused_form(node: ir.Node, types: Types) -> str:
    """Why TensorRT 10 would not take a node of a listed op; empty when it would."""
    data = node.inputs[1 if node.op_type == "Where" else 0]
    if data is not None and types[data] not in TRT10_TYPES[node.op_type]:
        return f"{types[data].name.lower()} is no type that TensorRT 10 computes it with"
    for index in _CONSTANTS.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.const_value is None:
            return f"its input {index} ({value.name}) has to be a constant"
    if "block_size" in node.attributes and data is not None and types[data] != _BLOCKS:
        return f"TensorRT 10 has no blocks of {types[data].name.lower()}"
    return ""
