"""CachedAttention -> one op that takes the fused projection as it is: our kernel, or GroupQueryAttention.

Both rotate, write into the shared buffers and attend over what they hold; `local_window_size` counts the token itself, as
in CachedAttention. Neither has a mask: rows of a batch are padded on the right, where no token looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from moiie_export.graph.evaluate import evaluate
from moiie_export.graph.rewriting import (
    CONTRIB,
    constant,
    fixed_sizes,
    insert,
    only_consumer,
    origin,
    producer,
    replace,
)
from moiie_runtime.engines import KERNELS

_HEAD_STEP = 16
"""Head sizes that both take are multiples of this; for others CachedAttention stays."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of the decoder."""

    query: int
    key: int
    size: int


@dataclass(frozen=True)
class _Shared:
    """Values that all layers share: index of each row's last key, the longest row, [B, T, -1], cosines and sines."""

    seqlens: ir.Value
    total: ir.Value
    shape: ir.Value
    tables: tuple[ir.Value, ir.Value]


def fuse_attention(model: ir.Model, heads: Heads, kernels: bool) -> int:
    """Rewrite every CachedAttention that is fed by one fused projection.

    Args:
        model: a decoder graph with bare nodes, its key and value buffers in the type they will have.
        heads: of its attention; where their size fits neither op, nothing is rewritten.
        kernels: whether our own kernel is there.

    Returns:
        How many were rewritten.
    """
    nodes = [node for node in model.graph if node.op_type == "CachedAttention"]
    found = [(node, ends) for node in nodes if (ends := _ends(node)) is not None]
    if not found or heads.size % _HEAD_STEP:
        return 0
    rotary = producer(found[0][0].inputs[0], "RotaryEmbedding")
    assert rotary is not None
    inputs = {str(value.name): value for value in model.graph.inputs}
    tables = _tables(model, rotary, inputs)
    shared = None if kernels else _shared(model, tables, inputs)
    for node, ends in found:
        if shared is None:
            _attend(node, ends, heads, [inputs["past_lengths"], *tables])
        else:
            _group_query(node, ends, heads, shared)
    return len(found)


def _ends(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Where the fused projection is reshaped into heads, and the reshape behind the attention."""
    query, key, value = node.inputs[:3]
    if producer(query, "RotaryEmbedding") is None or producer(key, "RotaryEmbedding") is None:
        return None
    sources = {origin(each, ("RotaryEmbedding", "Slice", "Transpose")) for each in (query, key, value)}
    reshape = producer(sources.pop(), "Reshape") if len(sources) == 1 else None
    turned = only_consumer(node.outputs[0], "Transpose")
    joined = None if turned is None else only_consumer(turned.outputs[0], "Reshape")
    return None if reshape is None or joined is None else (reshape, joined)


def _shared(model: ir.Model, tables: tuple[ir.Value, ir.Value], inputs: Mapping[str, ir.Value]) -> _Shared:
    name, first = "attention", model.graph[0]

    def add(op: str, values: list[ir.Value | None], label: str, **attributes: int) -> ir.Value:
        return insert(first, op, values, name=f"{name}/{label}", **attributes).outputs[0]

    one = constant(model, f"{name}/1", np.array(1, np.int64))
    size = add("Shape", [inputs["inputs_embeds"]], "rows_tokens", start=0, end=2)
    total = add("Add", [inputs["past_lengths"], add("Gather", [size, one], "tokens")], "total")
    seqlens = add("Cast", [add("Sub", [total, one], "last")], "seqlens_k", to=ir.DataType.INT32.value)
    longest = add("ReduceMax", [total], "longest", keepdims=0)
    length = add("Cast", [longest], "total_length", to=ir.DataType.INT32.value)
    rest = constant(model, f"{name}/rest", np.array([-1], np.int64))
    shape = add("Concat", [size, rest], "shape", axis=0)
    return _Shared(seqlens, length, shape, tables)


def _tables(model: ir.Model, rotary: ir.Node, inputs: Mapping[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines of every position, [capacity, head size / 2], by the graph's own computation of them."""
    capacity = fixed_sizes(inputs["past_key_values.0.key"].shape)[1]  # behind the batch, which has a name
    hidden = fixed_sizes(inputs["inputs_embeds"].shape)[-1]
    feeds: Mapping[str, npt.NDArray[np.generic]] = {
        "past_lengths": np.arange(capacity, dtype=np.int64),
        "inputs_embeds": np.zeros((capacity, 1, hidden), np.float32),
    }
    values = [value for value in rotary.inputs[1:3] if value is not None]
    cosines, sines = (table.reshape(capacity, -1) for table in evaluate(model, values, feeds))
    return constant(model, "rotary/cos", cosines), constant(model, "rotary/sin", sines)


def _attend(node: ir.Node, ends: tuple[ir.Node, ir.Node], heads: Heads, rest: list[ir.Value]) -> None:
    reshape, joined = ends
    past_key = node.inputs[3]
    half = past_key is not None and past_key.dtype == ir.DataType.FLOAT16
    attention = insert(
        node,
        "AttendHalf" if half else "Attend",
        [reshape.inputs[0], *node.inputs[3:5], *rest],
        domain=KERNELS,
        outputs=3,
        name=f"{node.name}/Attend",
        num_heads=heads.query,
        kv_num_heads=heads.key,
        head_size=heads.size,
        local_window_size=node.attributes["local_window_size"].as_int(),
    )
    for old, new in zip((joined.outputs[0], *node.outputs[1:]), attention.outputs, strict=True):
        replace(old, new)


def _group_query(node: ir.Node, ends: tuple[ir.Node, ir.Node], heads: Heads, shared: _Shared) -> None:
    reshape, joined = ends
    packed = insert(node, "Reshape", [reshape.inputs[0], shared.shape], name=f"{node.name}/qkv")
    attention = insert(
        node,
        "GroupQueryAttention",
        [packed.outputs[0], None, None, *node.inputs[3:5], shared.seqlens, shared.total, *shared.tables],
        domain=CONTRIB,
        outputs=3,
        name=f"{node.name}/GroupQueryAttention",
        num_heads=heads.query,
        kv_num_heads=heads.key,
        do_rotary=1,
        local_window_size=node.attributes["local_window_size"].as_int() or -1,
    )
    for old, new in zip(node.outputs[1:], attention.outputs[1:], strict=True):
        replace(old, new)
    joined.replace_input_with(0, attention.outputs[0])
