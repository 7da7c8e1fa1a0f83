"""What a graph for TensorRT may hold: ops by dialect, and the attributes of each, which parsers ignore when unknown.

The list of trt10 is that of trt10_ops.py; its graphs were never parsed by TensorRT 10.3 here.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx.defs
import onnx_ir as ir

from moiie_export.graph.trt10_ops import TRT10_TYPES, refused_form
from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_types import value_types
from moiie_export.ops import DOMAIN

TRT10_OPSET, TRT10_INT4_OPSET, TRT10_IR_VERSION = 20, 21, 10

TRT10_OPS = frozenset(TRT10_TYPES)
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
    "ScatterND": frozenset(),
    "Resize": frozenset({"mode", "coordinate_transformation_mode", "cubic_coeff_a", "nearest_mode", "axes"})
    | {"antialias", "exclude_outside", "extrapolation_value", "keep_aspect_ratio_policy"},
}
"""For these, less than the standard allows."""

_INERT: Mapping[str, float | int] = {"antialias": 0, "exclude_outside": 0}


def check_rules(model: ir.Model, context: TrtContext) -> None:
    """Refuse ops and attributes that the dialect does not know, and for trt10 types that its ops are not computed in.

    Raises:
        MoiieError: naming the node.
    """
    allowed = TRT10_OPS if context.standard else TRT10_OPS | NEW_OPS
    types = value_types(model) if context.standard else {}
    for node in model.graph:
        names = set(node.attributes)
        if node.domain == DOMAIN:
            known = PLUGIN_ATTRIBUTES.get(node.op_type)
            if known is None:
                raise context.error(node, "has no plugin and no body was put in its place")
        elif node.op_type in NATIVE_ATTRIBUTES and not context.standard:
            known = NATIVE_ATTRIBUTES[node.op_type]
        elif node.domain == "" and node.op_type in allowed:
            known = _standard(node.op_type, model.opset_imports[""])
        else:
            raise context.error(node, f"dialect {context.target.dialect} has no such op")
        if names - known:
            raise context.error(node, f"attribute {sorted(names - known)[0]} is not one that the parser reads")
        _check_inert(node, context)
        if context.standard and node.domain == "" and (refused := refused_form(node, types)):
            raise context.error(node, refused)


def _check_inert(node: ir.Node, context: TrtContext) -> None:
    for name, value in _INERT.items():
        if node.attributes.get_int(name, int(value)) != value:
            raise context.error(node, f"{name} = {node.attributes[name].value} cannot be parsed")


def _standard(op_type: str, opset: int) -> frozenset[str]:
    if op_type in _STANDARD_ATTRIBUTES:
        return _STANDARD_ATTRIBUTES[op_type]
    return frozenset(onnx.defs.get_schema(op_type, opset).attributes)
