"""Experts by TensorRT's own layer (IMoELayer) where it exists: TensorRT 11 on SM 100 and 103; nothing of it was built here.

The node is a call of the function trt::TRT_MoE, which TensorRT's parser replaces by the layer and everything else computes
by its body. Weights lie there as [E, H, I] and [E, I, H]; turning them is free for constants only, so banks that are
inputs or quantised keep the dense body.

Shapes: B rows, S tokens, k experts a token, E experts, H hidden, I intermediate.
    hidden [B, S, H]; selected [B, S, k] int32, places among the E; scores [B, S, k]; gate, up [E, H, I]; down [E, I, H]
    -> [B, S, H]
Attribute: `activation_type`, 1 for SiLU.
"""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir

from moiie_export.graph.rewriting import constant, insert, replace
from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops import DOMAIN
from moiie_export.ops.op import OPSET, vector
from moiie_export.targets import has_native_moe

NATIVE_DOMAIN, NATIVE_OP = "trt", "TRT_MoE"
_SILU = 1


def lower_native_moe(model: ir.Model, context: TrtContext) -> None:
    """Replace each ExpertDispatch on constants by a call of TRT_MoE, and attach its body."""
    if not has_native_moe(context.target):
        return
    nodes = [
        node
        for node in model.graph
        if (node.domain, node.op_type) == (DOMAIN, "ExpertDispatch") and node.outputs[0].uses() and _is_plain(node)
    ]
    for node in nodes:
        replace(node.outputs[0], _call(model, node))
        model.graph.remove(node, safe=False)
    if nodes:
        model.opset_imports[NATIVE_DOMAIN] = 1
        body = ir.serde.deserialize_function(onnx.parser.parse_function(native_body()))
        model.functions[(NATIVE_DOMAIN, NATIVE_OP, "")] = body


def _is_plain(node: ir.Node) -> bool:
    """Whether its weights are constants as they are, not made of quantised ones."""
    return all(value is not None and value.const_value is not None for value in node.inputs[3:])


def native_body() -> str:
    """The function in ONNX text: every expert for every token, times its score."""
    lines = vector("first", [0]) + vector("last", [-1]) + vector("flat", [1, -1]) + vector("slot", [1])
    lines += """
    shape = Shape (hidden)
    width = Shape <start = 2> (hidden)
    rows_shape = Concat <axis = 0> (flat, width)
    rows = Reshape (hidden, rows_shape)
    gated = MatMul (rows, gate)
    sigmoid = Sigmoid (gated)
    silu = Mul (gated, sigmoid)
    raised = MatMul (rows, up)
    act = Mul (silu, raised)
    each = MatMul (act, down)
    top_k = Shape <start = 2> (selected)
    tokens = Constant <value = int64[1] {-1}> ()
    route_shape = Concat <axis = 0> (tokens, top_k)
    ids = Reshape (selected, route_shape)
    count = Shape <end = 1> (gate)
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    experts_count = Squeeze (count)
    experts = Range (zero, experts_count, one)
    wide_ids = Cast <to = 7> (ids)
    id_column = Unsqueeze (wide_ids, last)
    hits = Equal (id_column, experts)
    flags = CastLike (hits, scores)
    flat_scores = Reshape (scores, route_shape)
    score_column = Unsqueeze (flat_scores, last)
    spread = Mul (flags, score_column)
    shares = ReduceSum <keepdims = 0> (spread, slot)
    turned = Transpose <perm = [1, 0]> (shares)
    share_column = Unsqueeze (turned, last)
    weighted = Mul (each, share_column)
    total = ReduceSum <keepdims = 0> (weighted, first)
    out = Reshape (total, shape)"""
    return (
        f'<domain: "{NATIVE_DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{NATIVE_OP} <activation_type> (hidden, selected, scores, gate, up, down) => (out) {{{lines}\n}}"
    )


def _call(model: ir.Model, node: ir.Node) -> ir.Value:
    """hidden [T, H] -> the layer's result [T, H]. A route to an expert of another bank gets score 0 and any place."""
    hidden, ids, weights, gate_up, down = node.inputs
    held, name = list(node.attributes["experts"].as_ints()), node.name
    front = constant(model, "axes.0", np.array([0], np.int64))
    columns = constant(model, f"experts.{'.'.join(map(str, held))}", np.array(held, np.int32))
    last = constant(model, "axes.-1", np.array([-1], np.int64))
    nothing = constant(model, "zero.float32", np.array(0, np.float32))
    column = insert(node, "Unsqueeze", [ids, last], name=f"{name}/id").outputs[0]
    hits = insert(node, "Equal", [column, columns], name=f"{name}/hits").outputs[0]
    known = insert(node, "Cast", [hits], name=f"{name}/known", to=ir.DataType.INT32.value).outputs[0]
    place = insert(node, "ArgMax", [known], name=f"{name}/place", axis=-1, keepdims=0).outputs[0]
    selected = insert(node, "Cast", [place], name=f"{name}/selected", to=ir.DataType.INT32.value).outputs[0]
    most = insert(node, "ReduceMax", [known, last], name=f"{name}/most", keepdims=0).outputs[0]
    held_here = insert(node, "Cast", [most], name=f"{name}/held", to=ir.DataType.BOOL.value).outputs[0]
    scores = insert(node, "Where", [held_here, weights, nothing], name=f"{name}/scores").outputs[0]
    batched = [
        insert(node, "Unsqueeze", [value, front], name=f"{name}/{part}.batch").outputs[0]
        for value, part in ((hidden, "hidden"), (selected, "selected"), (scores, "scores"))
    ]
    halves = insert(node, "Split", [gate_up], outputs=2, name=f"{name}/halves", axis=1, num_outputs=2).outputs
    turned = [
        insert(node, "Transpose", [value], name=f"{name}/{part}", perm=[0, 2, 1]).outputs[0]
        for value, part in ((halves[0], "gate"), (halves[1], "up"), (down, "down"))
    ]
    inputs = [*batched, *turned]
    made = insert(node, NATIVE_OP, inputs, name=f"{name}/native", domain=NATIVE_DOMAIN, activation_type=_SILU)
    return insert(node, "Squeeze", [made.outputs[0], front], name=f"{name}/out").outputs[0]
