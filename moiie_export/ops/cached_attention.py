"""CachedAttention: write new keys and values into static buffers, attend over what they hold.

Shapes: B rows, Hq / Hkv query / key heads (Hq a multiple of Hkv), T new tokens, S capacity of the buffers, D head size.
    query [B, Hq, T, D]; key, value [B, Hkv, T, D]; past_key, past_value [B, Hkv, S, D]; past_lengths [B] int64
    -> out [B, Hq, T, D]; present_key, present_value [B, Hkv, S, D]
Token t of row b stands at position past_lengths[b] + t and sees the keys at positions <= its own; with attribute
`local_window_size` W > 0 only the W nearest of them, its own included (Phi-3: sliding_window + 1, spec moiie.md 4.5).
Rows shorter than T are padded on the right: their padding is written behind the row's length, where no token looks and
the next step overwrites it.
"""

from __future__ import annotations

import math

import torch

from moiie_export.ops.op import Attributes, Op, Port, function_text


@torch.library.custom_op("moiie::cached_attention", mutates_args=())
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    past_lengths: torch.Tensor,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention output and the updated buffers; scores scaled by 1/sqrt(D), softmax in float32."""
    present_key, present_value = past_key.clone(), past_value.clone()
    tokens = key.shape[2]
    for row, start in enumerate(past_lengths.tolist()):
        present_key[row, :, start : start + tokens] = key[row]
        present_value[row, :, start : start + tokens] = value[row]
    total = int(past_lengths.max()) + tokens
    groups = query.shape[1] // key.shape[1]
    keys = present_key[:, :, :total].repeat_interleave(groups, dim=1)
    values = present_value[:, :, :total].repeat_interleave(groups, dim=1)
    positions = (past_lengths[:, None] + torch.arange(tokens))[:, None, :, None]
    slots = torch.arange(total)
    seen = slots <= positions
    if local_window_size > 0:
        seen = seen & (slots > positions - local_window_size)
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
    past_lengths: torch.Tensor,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


def _body(attributes: Attributes, _: int) -> str:
    """Static buffers, but work that grows with what they hold: keys are cut to the longest row before attention."""
    window = int(attributes["local_window_size"])
    lines = """
    present_key = TensorScatter <axis = -2> (past_key, key, past_lengths)
    present_value = TensorScatter <axis = -2> (past_value, value, past_lengths)
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    zero = Constant <value_ints = [0]> ()
    token_axis = Constant <value_ints = [2]> ()
    row_axes = Constant <value_ints = [1, 2, 3]> ()
    column_axis = Constant <value_ints = [1]> ()
    tokens = Shape <start = 2, end = 3> (query)
    longest = ReduceMax <keepdims = 0> (past_lengths)
    total = Add (tokens, longest)
    keys = Slice (present_key, zero, total, token_axis)
    values = Slice (present_value, zero, total, token_axis)
    token_count = Squeeze (tokens)
    slot_count = Squeeze (total)
    token = Range (first, token_count, step)
    slots = Range (first, slot_count, step)
    past = Unsqueeze (past_lengths, row_axes)
    token_column = Unsqueeze (token, column_axis)
    positions = Add (past, token_column)
    causal = LessOrEqual (slots, positions)"""
    if window > 0:
        lines += f"""
    window = Constant <value_int = {window}> ()
    oldest = Sub (positions, window)
    near = Greater (slots, oldest)
    seen = And (causal, near)"""
    else:
        lines += "\n    seen = Identity (causal)"
    lines += "\n    out = Attention (query, keys, values, seen)"
    inputs = ["query", "key", "value", "past_key", "past_value", "past_lengths"]
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
        Port("past_lengths", "tensor(int64)"),
    ),
    outputs=(
        Port("out", "tensor(float)"),
        Port("present_key", "tensor(float)"),
        Port("present_value", "tensor(float)"),
    ),
    attributes={"local_window_size": "int"},
    body=_body,
    torch_arguments=("query", "key", "value", "past_key", "past_value", "past_lengths", "local_window_size"),
)
