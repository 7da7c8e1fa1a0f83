"""DeformableSample: bilinear samples of a padded map, in torch and in the portable body, against two other forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from moiie_export.ops import OPS
from moiie_export.ops.deformable_sample import deformable_sample

Run = Callable[..., list[np.ndarray]]
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """`grids`: (height, width) of each map; `spare`: rows of padding behind the largest."""

    grids: tuple[tuple[int, int], ...] = ((5, 7),)
    spare: int = 0
    queries: int = 6
    heads: int = 2
    width: int = 3
    points: int = 4


def make(sizes: Sizes, seed: int = 0) -> Inputs:
    """Random tensors; points lie up to two pixels outside the map, and rows of padding hold large garbage."""
    rng = np.random.default_rng(seed)
    images, rows = len(sizes.grids), max(h * w for h, w in sizes.grids) + sizes.spare
    value = rng.standard_normal((images, rows, sizes.heads, sizes.width)).astype(np.float32)
    shape = (images, sizes.queries, sizes.heads, sizes.points)
    grid = np.array([[w, h] for h, w in sizes.grids], np.float32)
    points = rng.random((*shape, 2)) * (grid + 3)[:, None, None, None] - 2
    for image, (height, width) in enumerate(sizes.grids):
        value[image, height * width :] = 1e6
    weights = rng.random(shape).astype(np.float32)
    return {"value": value, "points": points.astype(np.float32), "weights": weights, "grid_size": grid}


def in_torch(inputs: Inputs) -> np.ndarray:
    return deformable_sample(*(torch.from_numpy(value) for value in inputs.values())).numpy()


def by_hand(inputs: Inputs) -> np.ndarray:
    """Point by point in float64: every pixel of the map weighs max(0, 1 - |dx|) * max(0, 1 - |dy|)."""
    value, points, weights = (inputs[name].astype(np.float64) for name in ("value", "points", "weights"))
    images, queries, heads, _ = weights.shape
    out = np.zeros((images, queries, heads, value.shape[3]))
    for image, (width, height) in enumerate(inputs["grid_size"].astype(int)):
        maps = value[image, : width * height].reshape(height, width, heads, -1)
        x, y = points[image, ..., 0, None], points[image, ..., 1, None]  # [Q, h, P, 1]
        across = np.maximum(0, 1 - np.abs(x - np.arange(width)))
        down = np.maximum(0, 1 - np.abs(y - np.arange(height)))
        out[image] = np.einsum("qhp,qhpx,qhpy,yxhd->qhd", weights[image], across, down, maps)
    return out.reshape(images, queries, -1)


def by_grid_sample(inputs: Inputs) -> np.ndarray:
    """The authors' form: torch's own sampler on coordinates in -1 .. 1, pixel edges at the ends (spec 1.1)."""
    value, points, weights, grid = (torch.from_numpy(each) for each in inputs.values())
    rows = []
    for image, (width, height) in enumerate(grid.long().tolist()):
        maps = value[image, : width * height].permute(1, 2, 0).reshape(-1, value.shape[3], height, width)
        places = (2 * (points[image] + 0.5) / grid[image] - 1).transpose(0, 1)  # [h, Q, P, 2]
        sampled = F.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        summed = (sampled * weights[image].transpose(0, 1).unsqueeze(1)).sum(dim=-1)  # [h, D, Q]
        rows.append(summed.permute(2, 0, 1).flatten(1))
    return torch.stack(rows).numpy()


def check(run_body: Run, sizes: Sizes, seed: int = 0) -> None:
    inputs = make(sizes, seed)
    expected = by_hand(inputs).astype(np.float32)
    for found in (in_torch(inputs), run_body("DeformableSample", {}, inputs)[0], by_grid_sample(inputs)):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5, strict=True)


@pytest.mark.parametrize("grid", [(32, 32), (45, 45), (12, 33), (5, 40), (1, 9), (9, 1), (1, 1), (143, 14)])
def test_body_equals_torch_equals_the_formula_equals_grid_sample(run_body: Run, grid: tuple[int, int]) -> None:
    check(run_body, Sizes(grids=(grid,), queries=40))


@pytest.mark.parametrize("spare", [0, 5])
def test_maps_of_different_grids_in_one_batch(run_body: Run, spare: int) -> None:
    """Each alone gives the same rows: neither padding nor the neighbour is ever read."""
    sizes = Sizes(grids=((4, 6), (24, 1), (3, 3)), spare=spare)
    check(run_body, sizes)
    inputs = make(sizes)
    together = run_body("DeformableSample", {}, inputs)[0]
    for image, (height, width) in enumerate(sizes.grids):
        alone = {name: value[image : image + 1] for name, value in inputs.items()}
        alone["value"] = alone["value"][:, : height * width]
        for found in (in_torch(alone), run_body("DeformableSample", {}, alone)[0]):
            np.testing.assert_allclose(found, together[image : image + 1], atol=1e-6)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3).map(tuple),
    spare=st.integers(0, 3),
    queries=st.integers(1, 5),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    points=st.integers(1, 4),
)
def test_any_sizes(
    run_body: Run,
    grids: tuple[tuple[int, int], ...],
    spare: int,
    queries: int,
    heads: int,
    width: int,
    points: int,
) -> None:
    check(run_body, Sizes(grids, spare, queries, heads, width, points), seed=queries)


def test_pixels_lie_row_by_row_and_x_counts_along_the_row(run_body: Run) -> None:
    """A sample at the centre of a pixel is that pixel; swapped coordinates would give others."""
    height, width = 3, 5
    value = np.arange(height * width, dtype=np.float32).reshape(1, -1, 1, 1)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    points = np.stack([x, y], axis=-1).reshape(1, -1, 1, 1, 2).astype(np.float32)
    inputs = {
        "value": value,
        "points": points,
        "weights": np.ones(points.shape[:-1], np.float32),
        "grid_size": np.array([[width, height]], np.float32),
    }
    for found in (in_torch(inputs), run_body("DeformableSample", {}, inputs)[0]):
        np.testing.assert_array_equal(found.reshape(-1), np.arange(height * width))


def test_samples_fade_out_within_one_pixel_of_the_border(run_body: Run) -> None:
    edge = [-1.5, -1.0, -0.75, -0.25, 0.0, 2.0, 2.25, 2.75, 3.0, 3.5, 1e9, -1e9]
    points = np.array([[[[[place, 1.0]]] for place in edge]], np.float32)
    inputs = {
        "value": np.ones((1, 9, 1, 1), np.float32),
        "points": points,
        "weights": np.ones(points.shape[:-1], np.float32),
        "grid_size": np.array([[3, 3]], np.float32),
    }
    expected = [0, 0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0, 0, 0, 0]
    for axis in (slice(None), slice(None, None, -1)):
        turned = {**inputs, "points": np.ascontiguousarray(points[..., axis])}
        for found in (in_torch(turned), run_body("DeformableSample", {}, turned)[0]):
            np.testing.assert_allclose(found.reshape(-1), expected, atol=1e-6)


def test_a_grid_larger_than_its_memory_is_refused() -> None:
    inputs = make(Sizes(grids=((4, 4),)))
    inputs["value"] = inputs["value"][:, :15]
    inputs["points"][:] = 3.0
    with pytest.raises(RuntimeError, match="out of bounds"):
        in_torch(inputs)


def test_the_body_in_the_reference_evaluator(body_model: Callable[..., onnx.ModelProto]) -> None:
    """A second runtime that knows nothing of ONNX Runtime's leniencies."""
    inputs = make(Sizes(grids=((4, 6), (5, 2))))
    found = ReferenceEvaluator(body_model("DeformableSample", {}, inputs)).run(None, inputs)[0]
    np.testing.assert_allclose(found, by_hand(inputs), atol=1e-5, rtol=1e-5)


def test_the_body_holds_nothing_that_runtimes_get_wrong() -> None:
    function = onnx.parser.parse_function(OPS["DeformableSample"].body({}, 4))
    assert not {node.op_type for node in function.node} & {"GridSample", "NonZero", "Transpose"}


def test_the_fake_agrees_with_the_op() -> None:
    tensors = [torch.from_numpy(value) for value in make(Sizes(grids=((4, 6), (5, 2)))).values()]
    torch.library.opcheck(deformable_sample, tuple(tensors))
