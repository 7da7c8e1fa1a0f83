"""A static key-value cache: writing new keys or values into it, and attending to it with a few new tokens.

Head size D is at most BLOCK_D. `past_lengths` is what each batch row's cache held before the new tokens.
"""

import triton
import triton.language as tl


@triton.jit
def kv_cache_update(cache, update, past_lengths, G, S, T, D, BLOCK_D: tl.constexpr):
    """update [B, G, T, D] into cache [B, G, S, D], one program a row of D values; grid (B * G * T,)."""
    row = tl.program_id(0)
    head = row // T
    slot = tl.load(past_lengths + head // G) + row % T
    # A slot outside the buffer belongs to another head: nothing is written there.
    if (slot >= 0) & (slot < S):
        source = update + row.to(tl.int64) * D
        target = cache + (head.to(tl.int64) * S + slot) * D
        for start in range(0, D, BLOCK_D):
            lane = start + tl.arange(0, BLOCK_D)
            tl.store(target + lane, tl.load(source + lane, mask=lane < D), mask=lane < D)


@triton.jit
def decode_attention_split(
    query,  # [B, Q, T, D] = [heads * shared, D]: the query rows that share a key head are neighbours
    key,  # [B, G, S, D]
    value,  # [B, G, S, D]
    past_lengths,  # int32 [B]
    partial,  # float32 [heads * shared, splits, D], out: softmax-weighted values of a split
    stats,  # float32 [heads * shared, splits, 2], out: largest score in base 2, sum of exponentials
    G,
    T,
    S,
    D,
    shared,
    splits,
    window,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attention of BLOCK_M query rows to SPLIT slots; grid (heads, splits, cdiv(shared, BLOCK_M))."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    line = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = line < shared
    row = head.to(tl.int64) * shared + line
    past = tl.load(past_lengths + head // G)
    position = past + line % T
    oldest = tl.where(window > 0, position - window + 1, 0)

    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    # Slots that some token of this row sees; where there are none, the split ends at once.
    first = split * SPLIT
    last = tl.minimum(tl.minimum(first + SPLIT, past + T), S)
    if (first < last) & ((window <= 0) | (last > past - window + 1)):
        oldest_of_all = tl.min(tl.where(used, oldest, S))
        lane = tl.arange(0, BLOCK_D)
        inside = lane < D
        cell = head.to(tl.int64) * S * D
        q = tl.load(query + row[:, None] * D + lane[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(first, last, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            place = cell + slot[:, None] * D + lane[None, :]
            k = tl.load(key + place, mask=(slot < last)[:, None] & inside[None, :], other=0.0)
            # What no token sees may be anything in the buffer, also NaN: such values are not read.
            visible = (slot < last) & (slot >= oldest_of_all)
            v = tl.load(value + place, mask=visible[:, None] & inside[None, :], other=0.0)
            score = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
            seen = (slot[None, :] <= position[:, None]) & (slot[None, :] >= oldest[:, None]) & (slot < last)[None, :]
            score = tl.where(seen, score, -float("inf"))
            higher = tl.maximum(best, tl.max(score, axis=1))
            # Rows that have seen nothing yet have no largest score; -inf - -inf would be NaN.
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            share = tl.exp2(score - safe[:, None])
            shrink = tl.exp2(best - safe)
            weight = weight * shrink + tl.sum(share, axis=1)
            total = total * shrink[:, None] + tl.dot(share.to(v.dtype), v)
            best = higher
        place = (row * splits + split)[:, None] * D + lane[None, :]
        tl.store(partial + place, total, mask=used[:, None] & inside[None, :])
    place = stats + (row * splits + split) * 2
    tl.store(place, best, mask=used)
    tl.store(place + 1, weight, mask=used)


@triton.jit
def decode_attention_merge(partial, stats, out, D, splits, BLOCK_D: tl.constexpr):
    """The splits of one query row together; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    inside = lane < D
    best = tl.full([], -float("inf"), tl.float32)
    weight = tl.zeros([], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for split in range(splits):
        score = tl.load(stats + (row * splits + split) * 2)
        if score > -float("inf"):
            higher = tl.maximum(best, score)
            shrink = tl.exp2(best - higher)
            share = tl.exp2(score - higher)
            weight = weight * shrink + tl.load(stats + (row * splits + split) * 2 + 1) * share
            part = tl.load(partial + (row * splits + split) * D + lane, mask=inside, other=0.0)
            total = total * shrink + part * share
            best = higher
    tl.store(out + row * D + lane, (total / weight).to(out.dtype.element_ty), mask=inside)
