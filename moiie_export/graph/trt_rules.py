"""What a graph for TensorRT may hold: ops by dialect, and the attributes of each, which parsers ignore when unknown.

The list of trt10 is a narrow one, of ops that TensorRT 10 is known to take; it was never parsed by 10.3 here.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx.defs
import onnx_ir as ir

from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops import DOMAIN

TRT10_OPSET, TRT10_INT4_OPSET, TRT10_IR_VERSION = 20, 21, 10

TRT10_OPS = frozenset(
    {
        *("Abs", "Add", "And", "ArgMax", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Cos", "CumSum"),
        *(
            "DequantizeLinear",
            "Div",
            "Equal",
            "Expand",
            "Floor",
            "Gather",
            "GatherElements",
            "GatherND",
            "Gelu",
            "Gemm",
        ),
        *("Greater", "GreaterOrEqual", "Identity", "LayerNormalization", "Less", "LessOrEqual", "MatMul", "Mod", "Mul"),
        *("Not", "Or", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean"),
        *("ReduceSum", "Relu", "Reshape", "Resize", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice", "Softmax"),
        *("Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where"),
    }
)
NEW_OPS = frozenset({"RMSNormalization", "RotaryEmbedding"})
"""What trt11 and rtx take beyond that, of standard ONNX."""

_PLUGIN = frozenset({"plugin_version", "plugin_namespace"})
NATIVE_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "TRT_Attention": frozenset({"causal_kind", "query_form", "TRT_decomposable"}),
    "TRT_KVCacheUpdate": frozenset(),
    "TRT_MoE": frozenset({"activation_type"}),
}
PLUGIN_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "ExpertDispatch": _PLUGIN | {"experts"},
    "QuantizedExpertDispatch": _PLUGIN | {"experts", "bits", "group_size"},
    "Fp8ExpertDispatch": _PLUGIN | {"experts"},
    "KVCacheUpdate": _PLUGIN,
    "DecodeAttention": _PLUGIN | {"window", "scale"},
    "DeformableSample": _PLUGIN,
}
_STANDARD_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "RotaryEmbedding": frozenset(),
    "RMSNormalization": frozenset({"axis", "epsilon", "stash_type"}),
    "Resize": frozenset({"mode", "coordinate_transformation_mode", "cubic_coeff_a", "nearest_mode", "axes"})
    | {"antialias", "exclude_outside", "extrapolation_value", "keep_aspect_ratio_policy"},
}
"""For these, less than the standard allows."""

_INERT: Mapping[str, float | int] = {"antialias": 0, "exclude_outside": 0}


def check_rules(model: ir.Model, context: TrtContext) -> None:
    """Refuse ops and attributes that the dialect does not know.

    Raises:
        MoiieError: naming the node.
    """
    allowed = TRT10_OPS if context.standard else TRT10_OPS | NEW_OPS
    for node in model.graph:
        names = set(node.attributes)
        if node.domain == DOMAIN:
            known = PLUGIN_ATTRIBUTES.get(node.op_type)
            if known is None:
                raise context.error(node, "has no plugin and no body was put in its place")
        elif node.op_type in NATIVE_ATTRIBUTES and not context.standard:
            known = NATIVE_ATTRIBUTES[node.op_type]
        elif node.domain == "" and node.op_type in allowed:
            known = _STANDARD_ATTRIBUTES.get(node.op_type) or _schema(node.op_type, model.opset_imports[""])
        else:
            raise context.error(node, f"dialect {context.target.dialect} has no such op")
        if names - known:
            raise context.error(node, f"attribute {sorted(names - known)[0]} is not one that the parser reads")
        _check_inert(node, context)


def _check_inert(node: ir.Node, context: TrtContext) -> None:
    for name, value in _INERT.items():
        if node.attributes.get_int(name, int(value)) != value:
            raise context.error(node, f"{name} = {node.attributes[name].value} cannot be parsed")


def _schema(op_type: str, opset: int) -> frozenset[str]:
    return frozenset(onnx.defs.get_schema(op_type, opset).attributes)
