"""Routes: which row of a bank an expert id is, and the order in which prefill visits routed rows.

A route is one (token, choice) pair, number token * top_k + choice. A bank holds the experts whose bits are set in
`expert_mask`, in ascending order of their ids; ids lie below 64. A route to any other id adds nothing.
"""

import triton
import triton.language as tl


@triton.jit
def bank_row(expert_mask, expert):
    """The bank's row that holds `expert`, or -1. Works on scalars and tensors of ids."""
    safe = tl.minimum(tl.maximum(expert, 0), 63).to(tl.int64)
    present = (expert >= 0) & (expert < 64) & (((expert_mask >> safe) & 1) == 1)
    ones = tl.full([], -1, tl.int64)
    # The row is the number of set bits below the expert's own: pairs, nibbles and bytes are summed in place.
    bits = expert_mask & ~(ones << safe)
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    bits = (bits + (bits >> 32)) & 0x7F
    return tl.where(present, bits.to(tl.int32), -1)


@triton.jit
def expert_route(
    expert_ids,  # int32 [routes]
    order,  # int32 [blocks * BLOCK_M], out: the route of each row, -1 for padding
    block_rows,  # int32 [blocks], out: the bank's row of each block, -1 for blocks that are not needed
    expert_mask,
    routes,
    blocks,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a bank row: its routes, ascending, in blocks of their own.

    Every program counts for itself how many blocks the rows before it take, so that one launch without atomics is
    enough and the order is the same every time. Ascending routes keep what is contiguous contiguous: the rows of a
    vision expert are a run of neighbouring tokens, and a block gathers them from neighbouring lines of memory. A path of
    its own for such runs would gain nothing: with lines that are known to be neighbours, the loop over columns compiles to
    as many instructions as with gathered ones (SM 87, 90, 120).
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    bins = tl.arange(0, 64)
    counts = tl.zeros([64], tl.int32)
    for start in range(0, routes, CHUNK):
        route = start + lanes
        rows = bank_row(expert_mask, tl.load(expert_ids + route, mask=route < routes, other=-1))
        counts += tl.histogram(tl.maximum(rows, 0), 64, mask=rows >= 0)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(bins < row, needed, 0))
    my_blocks = tl.sum(tl.where(bins == row, needed, 0))
    my_count = tl.sum(tl.where(bins == row, counts, 0))

    base = order + first_block * BLOCK_M
    placed = tl.zeros([], tl.int32)
    for start in range(0, routes, CHUNK):
        route = start + lanes
        rows = bank_row(expert_mask, tl.load(expert_ids + route, mask=route < routes, other=-1))
        mine = (rows == row).to(tl.int32)
        tl.store(base + placed + tl.cumsum(mine) - 1, route, mask=mine == 1)
        placed += tl.sum(mine)
    padding = my_count + tl.arange(0, BLOCK_M)
    tl.store(base + padding, tl.full([BLOCK_M], -1, tl.int32), mask=padding < my_blocks * BLOCK_M)

    for start in range(0, my_blocks, 64):
        block = start + bins
        tl.store(block_rows + first_block + block, tl.full([64], 0, tl.int32) + row, mask=block < my_blocks)
    if row == tl.num_programs(0) - 1:
        for start in range(first_block + my_blocks, blocks, 64):
            block = start + bins
            tl.store(block_rows + block, tl.full([64], -1, tl.int32), mask=block < blocks)
