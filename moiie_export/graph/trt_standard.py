"""Ops of newer releases as older ones: what TensorRT 10.3 does not read becomes standard ops of opset 20."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import constant, insert, replace
from moiie_export.graph.trt_attention import NATIVE
from moiie_export.graph.trt_context import TrtContext, exact
from moiie_export.graph.trt_types import value_types

_DEFAULTS: dict[str, dict[str, int | float | str]] = {
    "ScatterND": {"reduction": "none"},
    "RMSNormalization": {"axis": -1, "stash_type": 1},
    "RotaryEmbedding": {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0},
    "Attention": {
        "is_causal": 0,
        "softcap": 0.0,
        "qk_matmul_output_mode": 0,
        "q_num_heads": 0,
        "kv_num_heads": 0,
        "softmax_precision": 0,
    },
}
"""The only values that are understood; an attribute that is not listed here is used."""


def strip_defaults(model: ir.Model, context: TrtContext) -> None:
    """Drop attributes that say what is said anyway, so that every attribute left is one the parser has to know."""
    for node in model.graph:
        for name, value in _DEFAULTS.get(node.op_type, {}).items() if node.domain == "" else ():
            attribute = node.attributes.get(name)
            if attribute is None:
                continue
            if attribute.value != value:
                raise context.error(node, f"{name} = {attribute.value} has no lowering; expected {value}")
            if node.op_type != "RMSNormalization":
                del node.attributes[name]


def compare_truths(model: ir.Model, context: TrtContext) -> None:
    """a == b of truth values as not (a xor b): no TensorRT documents Equal for them."""
    types = value_types(model)
    for node in list(model.graph):
        first = node.inputs[0] if node.domain == "" and node.op_type == "Equal" else None
        if first is not None and types[first] == ir.DataType.BOOL:
            other = insert(node, "Xor", node.inputs, name=f"{node.name}/other")
            replace(node.outputs[0], insert(node, "Not", other.outputs, name=f"{node.name}/same").outputs[0])


def lower_encoder_attention(model: ir.Model, context: TrtContext) -> None:
    """Replace Attention by the native layer, whose query carries the scale."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Attention":
            scaled = insert(node, "Mul", [node.inputs[0], _scale(model, node)], name=f"{node.name}/scale")
            exact(scaled)
            inputs = [scaled.outputs[0], *node.inputs[1:]]
            native = insert(node, "TRT_Attention", inputs, name=f"{node.name}/native", causal_kind="none", **NATIVE)
            replace(node.outputs[0], native.outputs[0])


def lower_to_standard(model: ir.Model, context: TrtContext) -> None:
    """Replace RMSNormalization, RotaryEmbedding and Attention."""
    lowered: dict[str, Callable[[ir.Model, ir.Node], ir.Value]] = {
        "RMSNormalization": _rms_norm,
        "RotaryEmbedding": _rotary,
        "Attention": _attention,
    }
    for node in list(model.graph):
        if node.domain == "" and node.op_type in lowered:
            if node.op_type == "RotaryEmbedding" and (len(node.inputs) != 3):
                raise context.error(node, "expected x, cosines and sines without position ids")
            replace(node.outputs[0], lowered[node.op_type](model, node))


def _rms_norm(model: ir.Model, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x^2) + epsilon) in float32, then times the weight."""
    (source, weight), name = node.inputs, node.name
    epsilon = node.attributes["epsilon"].as_float()
    last = constant(model, "axes.-1", np.array([-1], np.int64))
    small = constant(model, f"epsilon.{epsilon:g}", np.array(epsilon, np.float32))
    squares = insert(node, "Mul", [source, source], name=f"{name}/squares")
    mean = insert(node, "ReduceMean", [squares.outputs[0], last], name=f"{name}/mean", keepdims=1)
    above = insert(node, "Add", [mean.outputs[0], small], name=f"{name}/above")
    root = insert(node, "Sqrt", [above.outputs[0]], name=f"{name}/root")
    normed = insert(node, "Div", [source, root.outputs[0]], name=f"{name}/normed")
    exact(squares, mean, above, root, normed)
    return insert(node, "Mul", [normed.outputs[0], weight], name=f"{name}/weighted").outputs[0]


def _rotary(model: ir.Model, node: ir.Node) -> ir.Value:
    """Halves x1, x2 [B, heads, T, D/2] -> x1 cos - x2 sin, x2 cos + x1 sin."""
    (source, *tables), name = node.inputs, node.name
    heads = constant(model, "axes.1", np.array([1], np.int64))
    cos, sin = (
        insert(node, "Unsqueeze", [t, heads], name=f"{name}/{n}") for t, n in zip(tables, ("cos", "sin"), strict=True)
    )
    halves = insert(node, "Split", [source], outputs=2, name=f"{name}/halves", axis=-1, num_outputs=2)
    low, high = halves.outputs

    def product(value: ir.Value, table: ir.Node, part: str) -> ir.Node:
        return insert(node, "Mul", [value, table.outputs[0]], name=f"{name}/{part}")

    products = [product(low, cos, "a"), product(high, sin, "b"), product(high, cos, "c"), product(low, sin, "d")]
    first = insert(node, "Sub", [each.outputs[0] for each in products[:2]], name=f"{name}/first")
    second = insert(node, "Add", [each.outputs[0] for each in products[2:]], name=f"{name}/second")
    whole = insert(node, "Concat", [first.outputs[0], second.outputs[0]], name=f"{name}/turned", axis=-1)
    exact(cos, sin, *products, first, second, whole)
    return whole.outputs[0]


def _attention(model: ir.Model, node: ir.Node) -> ir.Value:
    """softmax(q k^T / sqrt(D) + mask) v of an encoder, as many key heads as query heads; the query carries the scale."""
    query, key, value, *mask = node.inputs
    name = node.name
    factor = _scale(model, node)
    scaled = insert(node, "Mul", [query, factor], name=f"{name}/scale")
    exact(scaled)
    keys = insert(node, "Transpose", [key], name=f"{name}/keys", perm=[0, 1, 3, 2])
    scores = insert(node, "MatMul", [scaled.outputs[0], keys.outputs[0]], name=f"{name}/scores").outputs[0]
    if mask and mask[0] is not None:
        if value_types(model)[mask[0]] == ir.DataType.BOOL:
            lowest = constant(model, "lowest", np.array(-np.inf, np.float32))
            visible = insert(node, "Where", [mask[0], scores, lowest], name=f"{name}/visible")
        else:
            visible = insert(node, "Add", [scores, mask[0]], name=f"{name}/visible")
        exact(visible)
        scores = visible.outputs[0]
    shares = insert(node, "Softmax", [scores], name=f"{name}/shares", axis=-1)
    return insert(node, "MatMul", [shares.outputs[0], value], name=f"{name}/out").outputs[0]


def _scale(model: ir.Model, node: ir.Node) -> ir.Value:
    """The attribute, or 1 / sqrt(D) from the query's last dimension."""
    given = node.attributes.get("scale")
    if given is not None:
        return constant(model, f"scale.{given.as_float():g}", np.array(given.as_float(), np.float32))
    width = _head_size(node)
    return constant(model, f"attention_scale.{width}", np.array(1 / math.sqrt(width), np.float32))


def _head_size(node: ir.Node) -> int:
    """D, from the reshape that splits the heads: the last number of its shape."""
    value = node.inputs[0]
    while value is not None and (made := value.producer()) is not None:
        if made.op_type == "Reshape":
            shape = made.inputs[1]
            last = shape.producer() if shape is not None else None
            tensor = (last.inputs[-1] if last is not None and last.op_type == "Concat" else shape).const_value  # type: ignore[union-attr]
            if tensor is not None:
                return int(tensor.numpy().reshape(-1)[-1])
        value = made.inputs[0]
    raise ValueError(f"{node.name}: the head size is not known")
