"""Decoder attention for TensorRT: native KV and attention layers, our plugins, or standard ops.

Shapes: B rows, Hq / Hkv heads, G = Hq / Hkv, T new tokens, S capacity, D head size.

TRT_Attention neither scales its query nor its scores (seen in the network that the parser makes of it), so the query is
scaled here, in float32. In TensorRT 10.3 a scaled transposed key of a fused projection is miscomputed, which is why the
key is never touched.

Inputs and attributes of TRT_Attention are those that onnx-tensorrt 11's importer reads and that the parsers of TensorRT for
RTX 1.5 (which came with TensorRT 11.0), 1.6 and 1.7 take. The description of operators published with 11.0 tells others
(`is_causal`, a scale by default, lengths as inputs 6 and 7): those parsers ignore them without a word.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import constant, insert, replace
from moiie_export.graph.trt_context import TrtContext, exact, graph_input
from moiie_export.ops import DOMAIN

NATIVE = {"query_form": "padded_bhnd", "TRT_decomposable": 1}
"""Layout [B, heads, T, D]; a head size without a kernel of its own is computed by several."""

PLUGIN = {"plugin_version": "1", "plugin_namespace": ""}
"""With a namespace on the node the parser looks for a plugin before it looks at the function of the same name; in
TensorRT before 10.7 the function wins, seen in its importer."""


def lower_cached_attention(model: ir.Model, context: TrtContext) -> None:
    """Replace each CachedAttention."""
    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, "CachedAttention"):
            if context.standard:
                _standard(model, node, context)
            else:
                _native(model, node, context)


def _sizes(node: ir.Node, context: TrtContext) -> tuple[int, int, int]:
    """Hkv, S and D of a CachedAttention node."""
    cache = node.inputs[3]
    shape = None if cache is None else cache.shape
    if shape is None or not all(isinstance(shape[axis], int) for axis in (1, 2, 3)):
        raise context.error(
            node, "the KV buffers have no fixed heads, capacity and head size", "export the bundle again"
        )
    return int(shape[1]), int(shape[2]), int(shape[3])  # type: ignore[arg-type]


def _windowed(node: ir.Node, capacity: int) -> int:
    """The sliding window in keys, the token's own included; 0 when no context is as long."""
    window = node.attributes["local_window_size"].as_int()
    return window if 0 < window < capacity else 0


def _scaled(model: ir.Model, node: ir.Node, head_dim: int) -> ir.Value:
    """The query times 1 / sqrt(D)."""
    factor = constant(model, f"attention_scale.{head_dim}", np.array(1 / math.sqrt(head_dim), np.float32))
    product = insert(node, "Mul", [node.inputs[0], factor], name=f"{node.name}/scale")
    exact(product)
    return product.outputs[0]


def _lengths(model: ir.Model, node: ir.Node, context: TrtContext) -> ir.Value:
    """Keys that each row has before this step, int32 [B]."""
    past = graph_input(model, "past_lengths", context)
    return insert(node, "Cast", [past], name=f"{node.name}/past", to=ir.DataType.INT32.value).outputs[0]


def _seen(model: ir.Model, node: ir.Node, capacity: int, window: int) -> ir.Value:
    """Mask [B, 1, T, S], true where a token may look: causal, within the window, and behind no row's end."""
    positions = node.inputs[5]
    axes = constant(model, "axes.1.3", np.array([1, 3], np.int64))
    slots = constant(model, f"slots.{capacity}", np.arange(capacity, dtype=np.int64))
    column = insert(node, "Unsqueeze", [positions, axes], name=f"{node.name}/column").outputs[0]
    causal = insert(node, "LessOrEqual", [slots, column], name=f"{node.name}/causal").outputs[0]
    if not window:
        return causal
    width = constant(model, f"window.{window}", np.array(window, np.int64))
    oldest = insert(node, "Sub", [column, width], name=f"{node.name}/oldest").outputs[0]
    near = insert(node, "Greater", [slots, oldest], name=f"{node.name}/near").outputs[0]
    return insert(node, "And", [causal, near], name=f"{node.name}/seen").outputs[0]


def _native(model: ir.Model, node: ir.Node, context: TrtContext) -> None:
    """TRT_KVCacheUpdate and TRT_Attention."""
    _, capacity, head_dim = _sizes(node, context)
    past = _lengths(model, node, context)
    present = []
    for index, name in ((1, "key"), (2, "value")):
        update = insert(
            node, "TRT_KVCacheUpdate", [node.inputs[index + 2], node.inputs[index], past], name=f"{node.name}/{name}"
        )
        _alias(context, node, index)
        replace(node.outputs[index], update.outputs[0])
        present.append(update.outputs[0])
    query = _scaled(model, node, head_dim)
    tokens = insert(node, "Shape", [node.inputs[5]], name=f"{node.name}/tokens", start=1, end=2).outputs[0]
    count = insert(node, "Cast", [tokens], name=f"{node.name}/count", to=ir.DataType.INT32.value).outputs[0]
    lengths = insert(node, "Add", [past, count], name=f"{node.name}/lengths").outputs[0]
    window = _windowed(node, capacity)
    mask = _seen(model, node, capacity, window) if window else None
    context.attention = "mask" if window else "lower_right"
    context.counted_attention += 1
    attended = insert(
        node,
        "TRT_Attention",
        [query, *present, mask, None, lengths],
        name=f"{node.name}/attention",
        causal_kind="none" if window else "lower_right",
        **NATIVE,
    )
    replace(node.outputs[0], attended.outputs[0])


def _alias(context: TrtContext, node: ir.Node, index: int) -> None:
    past = node.inputs[index + 2]
    context.aliases[str(node.outputs[index].name)] = str(past.name if past is not None else "")


def _standard(model: ir.Model, node: ir.Node, context: TrtContext) -> None:
    """KV update by plugin or ScatterND; attention of one token by plugin, else MatMul, mask, Softmax."""
    heads, capacity, head_dim = _sizes(node, context)
    required = context.target.plugins == "required"
    if required:
        present = _plugin_update(model, node, context)
    else:
        present = _scatter(model, node, heads)
    for index, value in enumerate(present):
        replace(node.outputs[index + 1], value)
    window = _windowed(node, capacity)
    if required and context.component == "decoder_decode":
        attended = insert(
            node,
            "DecodeAttention",
            [node.inputs[0], *present, _lengths(model, node, context)],
            name=f"{node.name}/attention",
            domain=DOMAIN,
            window=window,
            scale=0.0,
            **PLUGIN,
        )
        context.attention = "plugin"
        replace(node.outputs[0], attended.outputs[0])
        return
    context.attention = "mask"
    seen = _seen(model, node, capacity, window)
    replace(node.outputs[0], _products(model, node, (heads, capacity, head_dim), seen, present))


def _plugin_update(model: ir.Model, node: ir.Node, context: TrtContext) -> list[ir.Value]:
    past = _lengths(model, node, context)
    present = []
    for index, name in ((1, "key"), (2, "value")):
        inputs = [node.inputs[index + 2], node.inputs[index], past]
        update = insert(node, "KVCacheUpdate", inputs, name=f"{node.name}/{name}", domain=DOMAIN, **PLUGIN)
        _alias(context, node, index)
        present.append(update.outputs[0])
    return present


def _scatter(model: ir.Model, node: ir.Node, heads: int) -> list[ir.Value]:
    """ScatterND into a copy of the buffers: slot positions[b, t] of every head of row b."""
    name, positions = node.name, node.inputs[5]
    one = constant(model, "one.int64", np.array([1], np.int64))
    heads_value = constant(model, f"heads.{heads}", np.array([heads], np.int64))
    rows = insert(node, "Shape", [positions], name=f"{name}/rows", start=0, end=1).outputs[0]
    tokens = insert(node, "Shape", [positions], name=f"{name}/row_tokens", start=1, end=2).outputs[0]
    target = insert(node, "Concat", [rows, heads_value, tokens, one], name=f"{name}/target", axis=0).outputs[0]
    zero, step = (
        constant(model, "zero.int64", np.array(0, np.int64)),
        constant(model, "step.int64", np.array(1, np.int64)),
    )
    count = insert(node, "Squeeze", [rows], name=f"{name}/row_count").outputs[0]
    row = insert(node, "Range", [zero, count, step], name=f"{name}/row").outputs[0]
    parts = [
        (row, constant(model, "axes.1.2.3", np.array([1, 2, 3], np.int64))),
        (
            constant(model, f"head_ids.{heads}", np.arange(heads, dtype=np.int64)),
            constant(model, "axes.0.2.3", np.array([0, 2, 3], np.int64)),
        ),
        (positions, constant(model, "axes.1.3", np.array([1, 3], np.int64))),
    ]
    spread = []
    for index, (value, axes) in enumerate(parts):
        cube = insert(node, "Unsqueeze", [value, axes], name=f"{name}/cube.{index}").outputs[0]
        spread.append(insert(node, "Expand", [cube, target], name=f"{name}/index.{index}").outputs[0])
    slots = insert(node, "Concat", spread, name=f"{name}/slots", axis=-1).outputs[0]
    return [
        insert(node, "ScatterND", [node.inputs[i + 2], slots, node.inputs[i]], name=f"{name}/{kind}").outputs[0]
        for i, kind in ((1, "key"), (2, "value"))
    ]


def _products(
    model: ir.Model, node: ir.Node, sizes: tuple[int, int, int], seen: ir.Value, present: list[ir.Value]
) -> ir.Value:
    """softmax(q k^T + mask) v without repeating keys: the G query heads of a key head stand below one another."""
    (heads, capacity, head_dim), name = sizes, node.name

    def fixed(*values: int) -> ir.Value:
        return constant(model, f"shape.{'.'.join(map(str, values))}", np.array(values, np.int64))

    query = _scaled(model, node, head_dim)
    rows = insert(node, "Reshape", [query, fixed(0, heads, -1, head_dim)], name=f"{name}/folded").outputs[0]
    keys = insert(node, "Transpose", [present[0]], name=f"{name}/keys", perm=[0, 1, 3, 2]).outputs[0]
    scores = insert(node, "MatMul", [rows, keys], name=f"{name}/scores").outputs[0]
    tokens = insert(node, "Shape", [node.inputs[5]], name=f"{name}/query_tokens", start=1, end=2).outputs[0]
    parts = [fixed(0, heads, -1), tokens, fixed(capacity)]
    apart = insert(node, "Concat", parts, name=f"{name}/apart", axis=0).outputs[0]
    groups = insert(node, "Reshape", [scores, apart], name=f"{name}/groups").outputs[0]
    mask = insert(node, "Unsqueeze", [seen, fixed(2)], name=f"{name}/mask").outputs[0]
    lowest = constant(model, "lowest", np.array(-np.inf, np.float32))
    visible = insert(node, "Where", [mask, groups, lowest], name=f"{name}/visible")
    shares = insert(node, "Softmax", [visible.outputs[0]], name=f"{name}/shares", axis=-1)
    exact(visible, shares)
    flat = insert(node, "Reshape", [shares.outputs[0], fixed(0, heads, -1, capacity)], name=f"{name}/flat").outputs[0]
    summed = insert(node, "MatMul", [flat, present[1]], name=f"{name}/summed").outputs[0]
    shape = insert(node, "Shape", [node.inputs[0]], name=f"{name}/shape").outputs[0]
    return insert(node, "Reshape", [summed, shape], name=f"{name}/out").outputs[0]
