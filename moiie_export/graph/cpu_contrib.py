"""Quantised layers -> MatMulNBits of ONNX Runtime: for GPUs, and CPUs on which our own kernels cannot be compiled.

The bodies of the quantised ops are written out, and where they multiply by a weight that they have just dequantised,
MatMulNBits does both at once. With accuracy level 4 it rounds activations to int8 in blocks, as our kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from moiie_export.graph.cpu_native import BITS, PackedWeight, Plan
from moiie_export.graph.passes import attach_bodies
from moiie_export.graph.rewriting import CONTRIB, fixed_sizes, initializer_for_later, insert, producer, replace
from moiie_export.ops import DOMAIN

_QUANTISED = ("QuantizedLinear", "QuantizedExpertDispatch")


@dataclass(frozen=True)
class NBits:
    """How MatMulNBits is to compute.

    Attributes:
        scales: type of scales, which is that of activations.
        accuracy_level: 4: activations are rounded to int8 in blocks; 0: they stay what they are.
    """

    scales: ir.DataType = ir.DataType.FLOAT
    accuracy_level: int = 4


def lower_to_contrib(model: ir.Model, plan: Plan, form: NBits | None = None) -> None:
    """Replace QuantizedLinear and QuantizedExpertDispatch of int4 and int8 weights in groups; fill the plan.

    Args:
        model: a graph with bare nodes.
        plan: gets the weights that MatMulNBits reads.
        form: None for that of a CPU.
    """
    attach_bodies(model)
    common.InlinePass(lambda function: function.domain == DOMAIN and function.name in _QUANTISED)(model)
    for node in list(model.graph):
        product = _product(node)
        if product is not None:
            _rewrite(model, node, (plan, form or NBits()), product)
    model.functions.clear()


def _product(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value] | None:
    """The dequantisation behind a Gemm, its stored values and its stored scales."""
    dequantize = producer(node.inputs[1], "DequantizeLinear") if node.op_type == "Gemm" else None
    cast = None if dequantize is None else producer(dequantize.inputs[1], "Cast")
    if dequantize is None or cast is None or "block_size" not in dequantize.attributes:
        return None
    values, scales = dequantize.inputs[0], cast.inputs[0]
    return None if values is None or scales is None else (dequantize, values, scales)


def _rewrite(
    model: ir.Model, node: ir.Node, into: tuple[Plan, NBits], product: tuple[ir.Node, ir.Value, ir.Value]
) -> None:
    (plan, form), (dequantize, values, scales) = into, product
    stored, stored_scales = values.const_value, scales.const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert isinstance(stored_scales, ir.ExternalTensor)
    rows, columns = fixed_sizes(stored.shape)
    bits = BITS[stored.dtype]
    group = dequantize.attributes["block_size"].as_int()
    weight = PackedWeight(str(values.name), stored, stored_scales, rows, columns, bits, group, None)
    plan[weight.name] = weight
    inputs = [
        node.inputs[0],
        initializer_for_later(model, weight.name, ir.DataType.UINT8, (rows, columns // group, group * bits // 8)),
        initializer_for_later(model, str(scales.name), form.scales, (rows, columns // group)),
    ]
    made = insert(
        node,
        "MatMulNBits",
        inputs,
        domain=CONTRIB,
        name=f"{node.outputs[0].name}/MatMulNBits",
        K=columns,
        N=rows,
        bits=bits,
        block_size=group,
        accuracy_level=form.accuracy_level,
    )
    replace(node.outputs[0], made.outputs[0])
