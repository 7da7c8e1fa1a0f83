"""The kernel of DeformableSample against the op's reference."""

from __future__ import annotations

import pytest
import torch

from moiie_export.ops.deformable_sample import deformable_sample
from tests.plugins.experts import relative_error
from tests.plugins.interpreter import needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(
    ("dtype", "bound", "width"),
    [(torch.float32, 1e-5, 12), (torch.float32, 1e-5, 70), (torch.float16, 1e-3, 12), (torch.float16, 1e-3, 32)],
    ids=["float32", "float32-wide-heads", "float16", "float16-aligned"],
)
def test_samples(dtype: torch.dtype, bound: float, width: int) -> None:
    """Maps of different grids in one batch, points in and around them, padding of memory that is never read."""
    from moiie_plugins.run import run

    images, queries, heads, points = 2, 19, 2, 3
    random = torch.Generator().manual_seed(width)
    grid_size = torch.tensor([[5.0, 4.0], [3.0, 6.0]])
    value = torch.randn(images, 23, heads, width, generator=random).to(dtype)
    value[0, 20:], value[1, 18:] = float("nan"), float("nan")
    places = torch.rand(images, queries, heads, points, 2, generator=random) * 9 - 2
    places[:, 0] = torch.tensor([4.0, 3.0])  # the centre of a corner's pixel
    places[:, 1] = torch.tensor([1e9, -1e9])
    weights = torch.rand(images, queries, heads, points, generator=random)
    tensors = {"value": value, "points": places, "weights": weights, "grid_size": grid_size}
    out = torch.full((images, queries, heads * width), float("nan"), dtype=dtype)
    run("DeformableSample", tensors, out, {})
    expected = deformable_sample(value.nan_to_num().double(), places.double(), weights.double(), grid_size.double())
    assert relative_error(out, expected) <= bound
