"""QuantizedLinear for TensorRT: DequantizeLinear on the stored numbers and a MatMul.

TensorRT for RTX 1.7 multiplies int4 out inside the product. Of int8 and fp8 with a scale for each row or group it makes a copy
in the target's precision, and since no copy depends on an activation, it makes those of all layers at once and holds them all.
So each copy is made to wait for its layer's rows; then those of one layer are held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import constant, fixed_sizes, insert, replace
from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops import DOMAIN


def lower_quantized_linear(model: ir.Model, context: TrtContext) -> None:
    """Replace each QuantizedLinear; the stored numbers stay a constant of the engine, 4 bits of each for int4."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, "QuantizedLinear"):
            continue
        rows, stored, scales, *rest = node.inputs
        assert stored is not None
        assert scales is not None
        group_size = node.attributes["group_size"].as_int()
        if group_size and context.standard and stored.dtype == ir.DataType.INT8:
            weight = _by_groups(model, node, (stored, scales), group_size)
        else:
            blocks = {"axis": 1, "block_size": group_size} if group_size else {"axis": 0}
            weight = insert(node, "DequantizeLinear", [stored, scales], name=f"{node.name}/weight", **blocks).outputs[0]
        turned = insert(node, "Transpose", [weight], name=f"{node.name}/columns", perm=[1, 0]).outputs[0]
        if rest and rest[0] is not None:
            rows = _rounded(model, node, rest[0])
        elif stored.dtype != ir.DataType.INT4 and context.target.dialect == "rtx":
            turned = _after(model, node, turned)
        product = insert(node, "MatMul", [rows, turned], name=f"{node.name}/product")
        replace(node.outputs[0], product.outputs[0])


def _by_groups(model: ir.Model, node: ir.Node, tensors: tuple[ir.Value, ir.Value], group_size: int) -> ir.Value:
    """int8 in groups for TensorRT 10: each group is a row of its own, with one scale.

    10.3 has blocks of int4 alone and 10.14 those of fp8 and fp4 too (NvInfer.h, IDequantizeLayer), never of int8.
    """
    stored, scales = tensors
    rows, columns = fixed_sizes(stored.shape)
    groups = _reshaped(model, stored, (rows * columns // group_size, group_size), "groups")
    steps = _reshaped(model, scales, (rows * columns // group_size,), "steps")
    values = insert(node, "DequantizeLinear", [groups, steps], name=f"{node.name}/groups", axis=0).outputs[0]
    shape = constant(model, f"shape.{rows}.{columns}", np.array([rows, columns], np.int64))
    return insert(node, "Reshape", [values, shape], name=f"{node.name}/weight").outputs[0]


def _after(model: ir.Model, node: ir.Node, weight: ir.Value) -> ir.Value:
    """The weight, as something that is not known before the rows are: zeros where a truth is above 1, which none is."""
    nothing, one = (
        constant(model, f"{name}.float32", np.array(n, np.float32)) for n, name in enumerate(("zero", "one"))
    )
    above = insert(node, "Greater", [node.inputs[0], nothing], name=f"{node.name}/above").outputs[0]
    counted = insert(node, "Cast", [above], name=f"{node.name}/counted", to=ir.DataType.FLOAT.value).outputs[0]
    most = insert(node, "ReduceMax", [counted], name=f"{node.name}/most", keepdims=0).outputs[0]
    never = insert(node, "Greater", [most, one], name=f"{node.name}/never").outputs[0]
    return insert(node, "Where", [never, nothing, weight], name=f"{node.name}/waiting").outputs[0]


def _reshaped(model: ir.Model, value: ir.Value, shape: Sequence[int], suffix: str) -> ir.Value:
    """The same numbers as an initialiser of another shape; they are read when they are written."""
    name, tensor = f"{value.name}.{suffix}", value.const_value
    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    assert tensor is not None
    dims = ir.Shape(shape)

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().reshape(tuple(shape)), dtype=tensor.dtype)

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=dims, name=name)
    made = ir.Value(name=name, shape=dims, type=ir.TensorType(tensor.dtype), const_value=lazy)
    model.graph.register_initializer(made)
    return made


def _rounded(model: ir.Model, node: ir.Node, input_scale: ir.Value) -> ir.Value:
    """Rows rounded to int8 with the calibrated scale."""
    step = _reshaped(model, input_scale, (), "scalar")
    zero = constant(model, "zero.int8", np.array(0, np.int8))
    stored = insert(node, "QuantizeLinear", [node.inputs[0], step, zero], name=f"{node.name}/stored").outputs[0]
    return insert(node, "DequantizeLinear", [stored, step, zero], name=f"{node.name}/rows").outputs[0]
