"""DeformableSample: weighted bilinear samples of a map at free points, head by head (spec mome.md, 1.1 and 6.2).

Shapes: n maps, S rows of memory, Q queries, h heads, D head size, P points a head.
    value [n, S, h, D]; points [n, Q, h, P, 2] as (x, y) in pixels; weights [n, Q, h, P];
    grid_size [n, 2] as (width, height), whole numbers -> out [n, Q, h * D]; everything float32
Pixel (x, y) of map i lies in row y * width + x of its memory, whose rows behind width * height are padding and never
read: maps of different grids share a batch. Whole numbers are the centres of pixels; outside the map everything is 0,
so that a point between the border's centres and nothing fades out (align_corners=False, zero padding).

The body gathers rows of memory. It holds no GridSample, which some runtimes compute wrongly without a word, and
coordinates stay float32 until a pixel is known: in half precision they are wrong by up to half a pixel.
"""

from __future__ import annotations

import torch

from moiie_export.ops.op import Attributes, Op, Port, function_text, scalar, vector


@torch.library.custom_op("moiie::deformable_sample", mutates_args=())
def deformable_sample(
    value: torch.Tensor, points: torch.Tensor, weights: torch.Tensor, grid_size: torch.Tensor
) -> torch.Tensor:
    """Samples [n, Q, h * D].

    Raises:
        RuntimeError: a grid has more pixels than its memory has rows.
    """
    images, queries, heads, count, _ = points.shape
    width = value.shape[3]
    size = grid_size.view(images, 1, 1, 1, 2)
    low = points.floor()
    per_head = value.transpose(1, 2)  # [n, h, S, D]
    out = value.new_zeros(images, heads, queries, width)
    for dx, dy in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        corner = low + low.new_tensor([dx, dy])
        inside = ((corner >= 0) & (corner < size)).all(dim=-1)
        x, y = corner.where(inside.unsqueeze(-1), 0.0).long().unbind(dim=-1)
        index = (y * size[..., 0].long() + x).permute(0, 2, 1, 3).reshape(images, heads, queries * count, 1)
        near = (1 - (points - corner).abs()).prod(dim=-1)
        share = (near * weights).where(inside, 0.0).permute(0, 2, 1, 3)
        rows = per_head.gather(2, index.expand(-1, -1, -1, width))
        out += (rows.view(images, heads, queries, count, width) * share.unsqueeze(-1)).sum(dim=3)
    return out.transpose(1, 2).reshape(images, queries, heads * width)


@deformable_sample.register_fake
def _(value: torch.Tensor, points: torch.Tensor, weights: torch.Tensor, grid_size: torch.Tensor) -> torch.Tensor:
    return value.new_empty((points.shape[0], points.shape[1], value.shape[2] * value.shape[3]))


_CORNERS = """
    corners = Constant <value = float[4,2] {0, 0, 1, 0, 0, 1, 1, 1}> ()
    nothing = Constant <value = float {0}> ()
    full = Constant <value = float {1}> ()
    low = Floor (points)
    low_row = Unsqueeze (low, before_last)
    corner = Add (low_row, corners)
    point_row = Unsqueeze (points, before_last)
    signed = Sub (point_row, corner)
    distance = Abs (signed)
    near = Sub (full, distance)
    size = Reshape (grid_size, size_shape)
    from_start = GreaterOrEqual (corner, nothing)
    before_end = Less (corner, size)
    inside = And (from_start, before_end)
    part = Where (inside, near, nothing)
    place = Where (inside, corner, nothing)"""
"""Four neighbours of each point [n, Q, h, P, 4, 2]: their shares along x and y, 0 outside, and a place inside the map."""

_ROWS = """
    pixel = Cast <to = 7> (place)
    x = Gather <axis = -1> (pixel, first)
    y = Gather <axis = -1> (pixel, second)
    whole = Cast <to = 7> (size)
    width = Gather <axis = -1> (whole, first)
    line = Mul (y, width)
    cell = Add (line, x)
    images = Shape <start = 0, end = 1> (value)
    memory = Shape <start = 1, end = 2> (value)
    heads = Shape <start = 2, end = 3> (value)
    image_count = Squeeze (images)
    head_count = Squeeze (heads)
    image = Range (first, image_count, second)
    image_column = Unsqueeze (image, image_axes)
    head = Range (first, head_count, second)
    head_column = Unsqueeze (head, head_axes)
    above = Mul (image_column, memory)
    line_of_all = Add (cell, above)
    before = Mul (line_of_all, heads)
    row = Add (before, head_column)
    depth = Shape <start = 3, end = 4> (value)
    table_shape = Concat <axis = 0> (rest, depth)
    table = Reshape (value, table_shape)
    picked = Gather <axis = 0> (table, row)"""
"""Rows of memory [n, Q, h, P, 4, D]; value is read where it lies, as a table of n * S * h rows."""

_SUM = """
    share_x = Gather <axis = -1> (part, first)
    share_y = Gather <axis = -1> (part, second)
    share = Mul (share_x, share_y)
    weight_column = Unsqueeze (weights, last)
    coefficient = Mul (share, weight_column)
    coefficient_row = Reshape (coefficient, row_shape)
    samples_shape = Concat <axis = 0> (grouped, depth)
    samples = Reshape (picked, samples_shape)
    summed = MatMul (coefficient_row, samples)
    out = Reshape (summed, out_shape)"""
"""One product a query and head: its 4 P coefficients times as many rows."""


def _body(attributes: Attributes, _: int) -> str:
    lines = scalar("first", 0) + scalar("second", 1) + vector("last", [-1]) + vector("before_last", [-2])
    lines += vector("size_shape", [-1, 1, 1, 1, 1, 2]) + vector("rest", [-1])
    lines += vector("image_axes", [1, 2, 3, 4]) + vector("head_axes", [1, 2])
    lines += vector("row_shape", [0, 0, 0, 1, -1]) + vector("grouped", [0, 0, 0, -1])
    lines += vector("out_shape", [0, 0, -1])
    inputs = ["value", "points", "weights", "grid_size"]
    return function_text("DeformableSample", (inputs, ["out"]), attributes, lines + _CORNERS + _ROWS + _SUM)


OP = Op(
    name="DeformableSample",
    torch_name="moiie::deformable_sample",
    inputs=(
        Port("value", "tensor(float)"),
        Port("points", "tensor(float)"),
        Port("weights", "tensor(float)"),
        Port("grid_size", "tensor(float)"),
    ),
    outputs=(Port("out", "tensor(float)"),),
    attributes={},
    body=_body,
    torch_arguments=("value", "points", "weights", "grid_size"),
)
