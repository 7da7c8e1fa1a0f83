"""Weighted bilinear samples of a map at free points, head by head; moiie_export/ops/deformable_sample.py says what."""

import triton
import triton.language as tl


@triton.jit
def deformable_sample(
    value,  # [n, S, h, D]
    points,  # float32 [n, Q, h, P, 2], (x, y) in pixels
    weights,  # float32 [n, Q, h, P]
    grid_size,  # float32 [n, 2], (width, height)
    out,  # [n, Q, h * D]
    S,
    h,
    D,
    Q,
    P,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_Q queries of one head of one map; grid (cdiv(Q, BLOCK_Q), h, n). Coordinates stay float32."""
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1)
    image = tl.program_id(2)
    valid = query < Q
    width = tl.load(grid_size + image * 2)
    height = tl.load(grid_size + image * 2 + 1)
    # Positions in [n, Q, h]; queries behind the last are never loaded.
    item = (image.to(tl.int64) * Q + query) * h + head
    memory = value + (image.to(tl.int64) * S * h + head) * D
    for first in range(0, D, BLOCK_D):
        lane = first + tl.arange(0, BLOCK_D)
        inside = lane < D
        total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for point in range(P):
            place = points + (item * P + point) * 2
            x = tl.load(place, mask=valid, other=-2.0)
            y = tl.load(place + 1, mask=valid, other=-2.0)
            weight = tl.load(weights + item * P + point, mask=valid, other=0.0)
            for corner in tl.static_range(4):
                near_x = tl.floor(x) + corner % 2
                near_y = tl.floor(y) + corner // 2
                hit = valid & (near_x >= 0) & (near_x < width) & (near_y >= 0) & (near_y < height)
                share = (1.0 - tl.abs(x - near_x)) * (1.0 - tl.abs(y - near_y)) * weight
                # Only a place that is known to lie in the map becomes a number of a pixel.
                cell = tl.where(hit, near_y, 0.0).to(tl.int32) * width.to(tl.int32)
                cell = cell + tl.where(hit, near_x, 0.0).to(tl.int32)
                hit = hit & (cell < S)
                row = memory + cell.to(tl.int64)[:, None] * (h * D)
                sample = tl.load(row + lane[None, :], mask=hit[:, None] & inside[None, :], other=0.0)
                total += sample.to(tl.float32) * tl.where(hit, share, 0.0)[:, None]
        place = out + item[:, None] * D + lane[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])
