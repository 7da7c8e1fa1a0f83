"""Experts for many routed rows: two grouped matrix products over blocks of rows of one expert each.

`order` and `block_rows` come from routing.expert_route. There are always as many blocks as could be needed; those that
are not end at once, so that shapes, grids and workspaces depend on no data. Blocks are the fastest grid axis: the
programs that run at the same time share a slice of weights.

A route's weighted product is written to its own row and summed by a last kernel, choice by choice: the result is the
same every time, which sums by atomics are not.
"""

import triton
import triton.language as tl

from moiie_plugins.kernels.products import dot
from moiie_plugins.kernels.routing import bank_row


@triton.jit
def _weight_tile(
    weights, scales, row_base, rows, valid, start, depth, group_shift, BITS: tl.constexpr, BLOCK_K: tl.constexpr, X
):
    """Columns start .. start + BLOCK_K of the rows row_base + rows as X values, [BLOCK_N, BLOCK_K], 0 outside.

    A scale that a whole row shares is left to `_row_scaled`.
    """
    BLOCK_N: tl.constexpr = rows.shape[0]
    index = row_base + rows
    if weights.dtype.element_ty.is_floating():
        column = start + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (column < depth)[None, :]
        # Every E4M3 number is one of either 16-bit type.
        return tl.load(weights + index[:, None] * depth + column[None, :], mask=inside, other=0.0).to(X)
    else:
        G: tl.constexpr = BLOCK_K // 32
        BYTES: tl.constexpr = 4 * BITS  # of 32 columns
        groups = depth // 32
        group = start // 32 + tl.arange(0, G)
        inside = valid[:, None] & (group < groups)[None, :]
        byte = group[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        place = weights + (index * (groups * BYTES))[:, None, None] + byte[None]
        packed = tl.load(place, mask=inside[:, :, None], other=0)
        scale_place = scales + (index * (depth >> group_shift))[:, None] + ((group * 32) >> group_shift)[None, :]
        scale = tl.load(scale_place, mask=inside, other=0.0).to(tl.float32)
        if BITS == 8:
            values = packed.to(tl.float32)
        else:
            low = ((packed << 4) >> 4).to(tl.float32)
            values = tl.join(low, (packed >> 4).to(tl.float32)).reshape(BLOCK_N, G, 32)
        return (values * scale[:, :, None]).to(X).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _row_scaled(products, weights, scales, row_base, rows, valid):
    """Products [*, BLOCK_N] with floats [BLOCK_N, *] times the scales of these rows, where floats have some."""
    if weights.dtype.element_ty.is_floating() and scales is not None:
        products *= tl.load(scales + row_base + rows, mask=valid, other=0.0)[None, :]
    return products


@triton.jit
def expert_prefill_gate_up(
    hidden,  # [tokens, hidden_size]
    order,  # int32 [blocks * BLOCK_M]
    block_rows,  # int32 [blocks]
    gate_up,  # [experts, 2 * intermediate, hidden_size], bytes where quantised
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
    """SwiGLU of the gate and up products of a block; grid (blocks, cdiv(intermediate, BLOCK_N))."""
    X = hidden.dtype.element_ty
    row = tl.load(block_rows + tl.program_id(0))
    if row >= 0:
        lines = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        route = tl.load(order + lines)
        used = route >= 0
        x_lines = hidden + (tl.maximum(route, 0) // top_k).to(tl.int64)[:, None] * hidden_size
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = column < intermediate
        gate_base = row.to(tl.int64) * (2 * intermediate)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, hidden_size, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_lines + depth[None, :], mask=used[:, None] & (depth < hidden_size)[None, :], other=0.0)
            w_gate = _weight_tile(
                gate_up, gate_up_scales, gate_base, column, valid, start, hidden_size, group_shift, BITS, BLOCK_K, X
            )
            w_up = _weight_tile(
                gate_up,
                gate_up_scales,
                gate_base + intermediate,
                column,
                valid,
                start,
                hidden_size,
                group_shift,
                BITS,
                BLOCK_K,
                X,
            )
            gate = dot(x, tl.trans(w_gate), gate)
            up = dot(x, tl.trans(w_up), up)
        gate = _row_scaled(gate, gate_up, gate_up_scales, gate_base, column, valid)
        up = _row_scaled(up, gate_up, gate_up_scales, gate_base + intermediate, column, valid)
        value = (gate * tl.sigmoid(gate) * up).to(X)
        place = act + lines.to(tl.int64)[:, None] * intermediate + column[None, :]
        tl.store(place, value, mask=used[:, None] & valid[None, :])


@triton.jit
def expert_prefill_down(
    act,  # [blocks * BLOCK_M, intermediate]
    order,  # int32 [blocks * BLOCK_M]
    block_rows,  # int32 [blocks]
    expert_weights,  # float32 [routes]
    down,  # [experts, hidden_size, intermediate], bytes where quantised
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
    X = act.dtype.element_ty
    row = tl.load(block_rows + tl.program_id(0))
    if row >= 0:
        lines = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        route = tl.load(order + lines)
        used = route >= 0
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = column < hidden_size
        base = row.to(tl.int64) * hidden_size
        x_lines = act + lines.to(tl.int64)[:, None] * intermediate
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, intermediate, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_lines + depth[None, :], mask=used[:, None] & (depth < intermediate)[None, :], other=0.0)
            weight = _weight_tile(
                down, down_scales, base, column, valid, start, intermediate, group_shift, BITS, BLOCK_K, X
            )
            total = dot(x, tl.trans(weight), total)
        total = _row_scaled(total, down, down_scales, base, column, valid)
        total *= tl.load(expert_weights + route, mask=used, other=0.0)[:, None]
        place = partial + tl.maximum(route, 0).to(tl.int64)[:, None] * hidden_size + column[None, :]
        tl.store(place, total.to(X), mask=used[:, None] & valid[None, :])


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
