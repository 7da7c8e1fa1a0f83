"""CachedAttention: write new keys and values into static buffers, attend over what they hold.

Shapes: B rows, Hq / Hkv query / key heads (Hq a multiple of Hkv), T new tokens, S capacity of the buffers, D head size.
    query [B, Hq, T, D]; key, value [B, Hkv, T, D]; past_key, past_value [B, Hkv, S, D]; positions [B, T] int64
    -> out [B, Hq, T, D]; present_key, present_value [B, Hkv, S, D]
The positions of a row are consecutive and begin at the number of keys it has already: keys and values are written there.
A token sees the keys at positions <= its own; with attribute `local_window_size` W > 0 only the W nearest of them, its
own included (Phi-3: sliding_window + 1, spec moiie.md 4.5).
Rows shorter than T are padded on the right: their padding is written behind the row's length, where no token looks and
the next step overwrites it. Slots that were never written must be finite (a mask cannot silence NaN): begin with zeros.

Mask and slots follow from positions and attributes alone (attribute `num_key_value_heads` repeats Hkv for that), so that
a runtime which merges equal nodes computes them once for all layers.
"""

from __future__ import annotations

import math

import torch

from moiie_export.ops.op import Attributes, Op, Port, function_text, scalar, vector


@torch.library.custom_op("moiie::cached_attention", mutates_args=())
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    positions: torch.Tensor,
    num_key_value_heads: int,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention output and the updated buffers; scores scaled by 1/sqrt(D), softmax in float32."""
    present_key, present_value = past_key.clone(), past_value.clone()
    tokens = key.shape[2]
    for row, start in enumerate(positions[:, 0].tolist()):
        present_key[row, :, start : start + tokens] = key[row]
        present_value[row, :, start : start + tokens] = value[row]
    total = int(positions.max()) + 1
    groups = query.shape[1] // key.shape[1]
    keys = present_key[:, :, :total].repeat_interleave(groups, dim=1)
    values = present_value[:, :, :total].repeat_interleave(groups, dim=1)
    column, slots = positions[:, None, :, None], torch.arange(total)
    seen = slots <= column
    if local_window_size > 0:
        seen = seen & (slots > column - local_window_size)
    scores = (query @ keys.transpose(2, 3)) / math.sqrt(query.shape[3])
    scores = scores.masked_fill(~seen, -torch.inf)
    out = scores.float().softmax(dim=-1).to(query.dtype) @ values
    return out, present_key, present_value


@cached_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    positions: torch.Tensor,
    num_key_value_heads: int,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


_WRITE = (
    scalar("first", 0)
    + scalar("step", 1)
    + vector("zero", [0])
    + vector("one", [1])
    + vector("row_axes", [1, 2, 3])
    + vector("head_axes", [1, 2])
    + vector("column_axes", [1, 3])
    + """
    rows = Shape <start = 0, end = 1> (positions)
    tokens = Shape <start = 1, end = 2> (positions)
    target = Concat <axis = 0> (rows, heads, tokens, one)
    row_count = Squeeze (rows)
    row = Range (first, row_count, step)
    head = Range (first, head_count, step)
    row_cube = Unsqueeze (row, row_axes)
    head_cube = Unsqueeze (head, head_axes)
    column = Unsqueeze (positions, column_axes)
    row_index = Expand (row_cube, target)
    head_index = Expand (head_cube, target)
    position_index = Expand (column, target)
    slot_index = Concat <axis = -1> (row_index, head_index, position_index)
    present_key = ScatterND (past_key, slot_index, key)
    present_value = ScatterND (past_value, slot_index, value)"""
)
"""Writes in place where past and present are one buffer. Not TensorScatter: no ONNX Runtime for Python 3.10 has it."""

_MASK = (
    vector("slot_axis", [2])
    + """
    furthest = ReduceMax <keepdims = 0> (positions)
    slot_count = Add (furthest, step)
    total = Unsqueeze (slot_count, zero)
    keys = Slice (present_key, zero, total, slot_axis)
    values = Slice (present_value, zero, total, slot_axis)
    slots = Range (first, slot_count, step)
    causal = LessOrEqual (slots, column)"""
)
"""Static buffers, but work that grows with what they hold: keys are cut to the longest row before attention."""


def _body(attributes: Attributes, _: int) -> str:
    heads = int(attributes["num_key_value_heads"])
    lines = vector("heads", [heads]) + scalar("head_count", heads) + _WRITE + _MASK
    window = int(attributes["local_window_size"])
    if window > 0:
        lines += scalar("window", window)
        lines += """
    oldest = Sub (column, window)
    near = Greater (slots, oldest)
    seen = And (causal, near)"""
    else:
        lines += "\n    seen = Identity (causal)"
    lines += "\n    out = Attention (query, keys, values, seen)"
    inputs = ["query", "key", "value", "past_key", "past_value", "positions"]
    outputs = ["out", "present_key", "present_value"]
    return function_text("CachedAttention", (inputs, outputs), attributes, lines)


OP = Op(
    name="CachedAttention",
    torch_name="moiie::cached_attention",
    inputs=(
        Port("query", "tensor(float)"),
        Port("key", "tensor(float)"),
        Port("value", "tensor(float)"),
        Port("past_key", "tensor(float)"),
        Port("past_value", "tensor(float)"),
        Port("positions", "tensor(int64)"),
    ),
    outputs=(
        Port("out", "tensor(float)"),
        Port("present_key", "tensor(float)"),
        Port("present_value", "tensor(float)"),
    ),
    attributes={"num_key_value_heads": "int", "local_window_size": "int"},
    body=_body,
    torch_arguments=(
        "query",
        "key",
        "value",
        "past_key",
        "past_value",
        "positions",
        "num_key_value_heads",
        "local_window_size",
    ),
)
