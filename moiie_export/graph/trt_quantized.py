"""QuantizedLinear for TensorRT: DequantizeLinear on the stored numbers and a MatMul, which it fuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import constant, insert, replace
from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops import DOMAIN


def lower_quantized_linear(model: ir.Model, context: TrtContext) -> None:
    """Replace each QuantizedLinear; the stored numbers stay a constant of the engine, 4 bits of each for int4."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, "QuantizedLinear"):
            continue
        rows, stored, scales, *rest = node.inputs
        group_size = node.attributes["group_size"].as_int()
        blocks = {"axis": 1, "block_size": group_size} if group_size else {"axis": 0}
        weight = insert(node, "DequantizeLinear", [stored, scales], name=f"{node.name}/weight", **blocks).outputs[0]
        turned = insert(node, "Transpose", [weight], name=f"{node.name}/columns", perm=[1, 0]).outputs[0]
        if rest and rest[0] is not None:
            rows = _rounded(model, node, rest[0])
        product = insert(node, "MatMul", [rows, turned], name=f"{node.name}/product")
        replace(node.outputs[0], product.outputs[0])


def _rounded(model: ir.Model, node: ir.Node, input_scale: ir.Value) -> ir.Value:
    """Rows rounded to int8 with the calibrated scale."""
    scalar = constant(model, "shape.scalar", np.array([], np.int64))
    step = insert(node, "Reshape", [input_scale, scalar], name=f"{node.name}/step").outputs[0]
    zero = constant(model, "zero.int8", np.array(0, np.int8))
    stored = insert(node, "QuantizeLinear", [node.inputs[0], step, zero], name=f"{node.name}/stored").outputs[0]
    return insert(node, "DequantizeLinear", [stored, step, zero], name=f"{node.name}/rows").outputs[0]
