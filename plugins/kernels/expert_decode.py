"""Experts for a few routed rows: two matrix-vector products, bound by the bandwidth of the weights they read.

No permutation: a program reads the id of its route and multiplies the chosen expert's rows, so that only the selected
experts are touched. Rows of one expert run at the same time (routes are the fastest grid axis) and meet in the cache.

Quantised rows are read as 32-bit words. A byte of a word becomes the float 1 + u / 256 by shifting it to the top of a
mantissa, u = q + 128 being unsigned: a shift and one logical operation instead of a conversion. Of two nibbles the upper
one becomes 1 + u / 16 and the lower one, by the same shift, 1 + u / 256, so that its x is multiplied by 16. The sum of the
offsets is subtracted once a word.

float8 rows are read as floats: GPUs that have the type convert it two numbers at a time. Their scale, one a row, is
multiplied to the sum.
"""

import triton
import triton.language as tl

from moiie_plugins.kernels.routing import bank_row


@triton.jit
def _on_top(words, byte: tl.constexpr):
    """Byte `byte` of each word where a float32's mantissa begins, with what stands behind it."""
    if byte < 2:
        return words << (15 - 8 * byte)
    else:
        return words >> (8 * byte - 15)


@triton.jit
def _word_products(words, x, BITS: tl.constexpr, G: tl.constexpr):
    """The sum over a word's fields of q * x / 2^BITS, [ROWS, G, W]; x [G, 32] in the order of columns."""
    even, odd = tl.split(x.reshape(G, BITS, 16 // BITS, 2))
    if BITS == 8:
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        planes = (x0, x1, x2, x3)
        total = (-1.5 * ((x0 + x1) + (x2 + x3)))[None]
        flipped = words ^ -2139062144  # 0x80808080
        for byte in tl.static_range(4):
            bits = (_on_top(flipped, byte) & 0x7F8000) | 0x3F800000
            total += bits.to(tl.float32, bitcast=True) * planes[byte][None]
        return total
    else:
        x04, x26 = tl.split((16.0 * even).reshape(G, 4, 2, 2))
        x15, x37 = tl.split(odd.reshape(G, 4, 2, 2))
        x0, x4 = tl.split(x04)
        x2, x6 = tl.split(x26)
        x1, x5 = tl.split(x15)
        x3, x7 = tl.split(x37)
        lower, upper = (x0, x2, x4, x6), (x1, x3, x5, x7)
        total = (-1.03125 * ((x0 + x2) + (x4 + x6)) - 1.5 * ((x1 + x3) + (x5 + x7)))[None]
        flipped = words ^ -2004318072  # 0x88888888
        for byte in tl.static_range(4):
            bits = _on_top(flipped, byte)  # the upper nibble; the lower one stands behind it, 1 + u / 256
            first = (bits & 0x078000) | 0x3F800000
            second = (bits & 0x780000) | 0x3F800000
            total += first.to(tl.float32, bitcast=True) * lower[byte][None]
            total += second.to(tl.float32, bitcast=True) * upper[byte][None]
        return total


@triton.jit
def _quantized_rows(x, weights, scales, rows, valid, depth, group_shift, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Products of the rows `rows` (int64) of a quantised matrix [*, depth] with the vector x; float32 [ROWS]."""
    WORDS: tl.constexpr = BITS  # 32-bit words in 32 columns
    G: tl.constexpr = BLOCK_K // 32
    ROWS: tl.constexpr = rows.shape[0]
    groups = depth // 32
    row_words = weights + (rows * (groups * WORDS))[:, None, None]
    row_scales = scales + (rows * (depth >> group_shift))[:, None]
    total = tl.zeros([ROWS, G, WORDS], tl.float32)
    for start in range(0, groups, G):
        group = start + tl.arange(0, G)
        inside = group < groups
        both = valid[:, None] & inside[None, :]
        word = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        words = tl.load(row_words + word[None], mask=both[:, :, None], other=0)
        scale = tl.load(row_scales + ((group * 32) >> group_shift)[None, :], mask=both, other=0.0)
        column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        part = tl.load(x + column, mask=inside[:, None], other=0.0).to(tl.float32)
        total += _word_products(words, part, BITS, G) * scale.to(tl.float32)[:, :, None]
    return tl.sum(tl.sum(total, axis=2), axis=1) * (1 << BITS)


@triton.jit
def _float_rows(x, weights, rows, valid, depth, BLOCK_K: tl.constexpr):
    """Products of the rows `rows` (int64) of a matrix of floats [*, depth] with the vector x; float32 [ROWS]."""
    ROWS: tl.constexpr = rows.shape[0]
    row_start = weights + (rows * depth)[:, None]
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, depth, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < depth
        weight = tl.load(row_start + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        part = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * part[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _rows_times(x, weights, scales, rows, valid, depth, group_shift, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    if weights.dtype.element_ty.is_floating():
        sums = _float_rows(x, weights, rows, valid, depth, BLOCK_K)
        if scales is not None:
            sums *= tl.load(scales + rows, mask=valid, other=0.0)
        return sums
    else:
        return _quantized_rows(x, weights, scales, rows, valid, depth, group_shift, BITS, BLOCK_K)


@triton.jit
def expert_decode_gate_up(
    hidden,  # [tokens, hidden_size]
    expert_ids,  # int32 [routes]
    gate_up,  # [experts, 2 * intermediate, hidden_size], as 32-bit words where quantised
    gate_up_scales,
    act,  # float32 [routes, intermediate], out
    expert_mask,
    top_k,
    hidden_size,
    intermediate,
    group_shift,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """SwiGLU of one route's gate and up products; grid (routes, cdiv(intermediate, BLOCK_N))."""
    route = tl.program_id(0)
    row = bank_row(expert_mask, tl.load(expert_ids + route))
    if row >= 0:
        # Gate and up rows alternate in one tile: twice the loads in flight, and a pair is split without a shuffle.
        lane = tl.arange(0, 2 * BLOCK_N)
        unit = tl.program_id(1) * BLOCK_N + lane // 2
        rows = row.to(tl.int64) * (2 * intermediate) + (unit + (lane % 2) * intermediate)
        x = hidden + (route // top_k).to(tl.int64) * hidden_size
        sums = _rows_times(
            x, gate_up, gate_up_scales, rows, unit < intermediate, hidden_size, group_shift, BITS, BLOCK_K
        )
        gate, up = tl.split(sums.reshape(BLOCK_N, 2))
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        value = gate * tl.sigmoid(gate) * up
        tl.store(act + route.to(tl.int64) * intermediate + column, value, mask=column < intermediate)


@triton.jit
def expert_decode_down(
    act,  # float32 [routes, intermediate]
    expert_ids,  # int32 [routes]
    expert_weights,  # float32 [routes]
    down,  # [experts, hidden_size, intermediate], as 32-bit words where quantised
    down_scales,
    out,  # [tokens, hidden_size], out
    expert_mask,
    top_k,
    hidden_size,
    intermediate,
    group_shift,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weighted sum of a token's down products; grid (tokens, cdiv(hidden_size, BLOCK_N))."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < hidden_size
    total = tl.zeros([BLOCK_N], tl.float32)
    for choice in range(top_k):
        route = token * top_k + choice
        row = bank_row(expert_mask, tl.load(expert_ids + route))
        if row >= 0:
            rows = row.to(tl.int64) * hidden_size + column
            x = act + route.to(tl.int64) * intermediate
            sums = _rows_times(x, down, down_scales, rows, valid, intermediate, group_shift, BITS, BLOCK_K)
            total += tl.load(expert_weights + route) * sums
    place = out + token.to(tl.int64) * hidden_size + column
    tl.store(place, total.to(out.dtype.element_ty), mask=valid)
