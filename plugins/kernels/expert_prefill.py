"""Experts for many routed rows: two grouped matrix products over blocks of rows of one expert each.

`order` and `block_rows` come from routing.expert_route. There are always as many blocks as could be needed; those that
are not end at once, so that shapes, grids and workspaces depend on no data. Blocks are the fastest grid axis: the
programs that run at the same time share a slice of weights.

Only columns are masked. Lines behind a block's last route take the first token's values, rows behind a matrix' last one
take that one's: what they give is never read, and a mask would cost every step of the loop.

A route's weighted product is written to its own row and summed by a last kernel, choice by choice: the result is the
same every time, which sums by atomics are not.
"""

import triton
import triton.language as tl

from moiie_plugins.kernels.packed import integers
from moiie_plugins.kernels.products import dot
from moiie_plugins.kernels.routing import bank_row


@triton.jit
def _scales(scales, rows, start, depth, group_shift, BLOCK_K: tl.constexpr):
    """Of the 32 columns each from `start` on, [*, BLOCK_K / 32]; 0 behind the last."""
    column = start + 32 * tl.arange(0, BLOCK_K // 32)
    place = scales + (rows * (depth >> group_shift))[:, None] + (column >> group_shift)[None, :]
    return tl.load(place, mask=(column < depth)[None, :], other=0.0)


@triton.jit
def _scaled(values, scale, X: tl.constexpr):
    """Whole numbers [ROWS, BLOCK_K] in float16 times their scales [ROWS, BLOCK_K / 32], as X."""
    ROWS: tl.constexpr = values.shape[0]
    groups = values.reshape(ROWS, scale.shape[1], 32)
    if tl.float16 == X:
        product = groups * scale[:, :, None]
    else:
        product = (groups.to(tl.float32) * scale.to(tl.float32)[:, :, None]).to(X)
    return product.reshape(ROWS, values.shape[1])


@triton.jit
def _products(x_lines, weights, scales, rows, depth, group_shift, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Lines of x times rows of a matrix [*, depth]: float32 [lines, rows].

    Scales of groups are read a step ahead: they are too narrow for the asynchronous copies that the rest arrives by.
    """
    X: tl.constexpr = x_lines.dtype.element_ty
    total = tl.zeros([x_lines.shape[0], rows.shape[0]], tl.float32)
    if weights.dtype.element_ty.is_floating():
        for start in range(0, depth, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            inside = (column < depth)[None, :]
            x = tl.load(x_lines + column[None, :], mask=inside, other=0.0)
            weight = tl.load(weights + rows[:, None] * depth + column[None, :], mask=inside, other=0.0)
            # Every E4M3 number is one of either 16-bit type.
            total = dot(x, tl.trans(weight.to(X)), total)
        if scales is not None:
            total *= tl.load(scales + rows)[None, :]
    else:
        WORDS: tl.constexpr = BLOCK_K * BITS // 32
        row_words = depth // 32 * BITS
        scale = _scales(scales, rows, 0, depth, group_shift, BLOCK_K)
        for start in range(0, depth, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_lines + column[None, :], mask=(column < depth)[None, :], other=0.0)
            word = start // 32 * BITS + tl.arange(0, WORDS)
            place = weights + rows[:, None] * row_words + word[None, :]
            words = tl.load(place, mask=(word < row_words)[None, :], other=0)
            following = _scales(scales, rows, start + BLOCK_K, depth, group_shift, BLOCK_K)
            total = dot(x, tl.trans(_scaled(integers(words, BITS), scale, X)), total)
            scale = following
    return total


@triton.jit
def expert_prefill_gate_up(
    hidden,  # [tokens, hidden_size]
    order,  # int32 [blocks * BLOCK_M]
    block_rows,  # int32 [blocks]
    gate_up,  # [experts, 2 * intermediate, hidden_size], as 32-bit words where quantised
    gate_up_scales,
    act,  # [blocks * BLOCK_M, intermediate], out
    top_k,
    hidden_size,
    intermediate,
    group_shift,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """SwiGLU of the gate and up products of a block; grid (blocks, cdiv(intermediate, BLOCK_N)).

    One product gives both, gate and up rows by turns: a thread that has a gate value has its up value too.
    """
    row = tl.load(block_rows + tl.program_id(0))
    if row >= 0:
        lines = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        token = tl.maximum(tl.load(order + lines), 0) // top_k
        turn = tl.arange(0, 2 * BLOCK_N)
        neuron = tl.minimum(tl.program_id(1) * BLOCK_N + turn // 2, intermediate - 1)
        rows = row.to(tl.int64) * (2 * intermediate) + turn % 2 * intermediate + neuron
        x_lines = hidden + token.to(tl.int64) * hidden_size
        both = _products(x_lines, gate_up, gate_up_scales, rows, hidden_size, group_shift, BITS, BLOCK_K)
        gate, up = tl.split(both.reshape(BLOCK_M, BLOCK_N, 2))
        value = (gate * tl.sigmoid(gate) * up).to(hidden.dtype.element_ty)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(act + lines * intermediate + column[None, :], value, mask=(column < intermediate)[None, :])


@triton.jit
def expert_prefill_down(
    act,  # [blocks * BLOCK_M, intermediate]
    order,  # int32 [blocks * BLOCK_M]
    block_rows,  # int32 [blocks]
    expert_weights,  # float32 [routes]
    down,  # [experts, hidden_size, intermediate], as 32-bit words where quantised
    down_scales,
    partial,  # [routes, hidden_size], out
    hidden_size,
    intermediate,
    group_shift,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weighted down products of a block, each to its route's row; grid (blocks, cdiv(hidden_size, BLOCK_N))."""
    row = tl.load(block_rows + tl.program_id(0))
    if row >= 0:
        lines = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = row.to(tl.int64) * hidden_size + tl.minimum(column, hidden_size - 1)
        x_lines = act + lines * intermediate
        total = _products(x_lines, down, down_scales, rows, intermediate, group_shift, BITS, BLOCK_K)
        route = tl.load(order + lines)
        used = route >= 0
        total *= tl.load(expert_weights + route, mask=used, other=0.0)
        place = partial + tl.maximum(route, 0).to(tl.int64) * hidden_size + column[None, :]
        tl.store(place, total.to(partial.dtype.element_ty), mask=used & (column < hidden_size)[None, :])


@triton.jit
def expert_combine(
    partial,  # [routes, hidden_size]
    expert_ids,  # int32 [routes]
    out,  # [tokens, hidden_size], out
    expert_mask,
    top_k,
    hidden_size,
    BLOCK_N: tl.constexpr,
):
    """The sum over a token's choices; grid (tokens, cdiv(hidden_size, BLOCK_N))."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < hidden_size
    total = tl.zeros([BLOCK_N], tl.float32)
    for choice in range(top_k):
        route = token * top_k + choice
        # The rows of routes that this bank does not serve were never written.
        if bank_row(expert_mask, tl.load(expert_ids + route)) >= 0:
            line = partial + route.to(tl.int64) * hidden_size
            total += tl.load(line + column, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * hidden_size + column, total.to(out.dtype.element_ty), mask=valid)
