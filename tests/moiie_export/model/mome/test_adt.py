"""Pooling and the ADT: against the authors' numbers, and against the definition written down independently."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_export.model.mome.adt import Adt
from moiie_export.model.mome.pooling import pool, side_matrix
from moiie_export.mome_config import AdtConfig
from tests import mome_official as official
from tests.mome_golden import pooling_matrix

Grid = tuple[int, int]
BINS = (16, 16)


def sizes(*grids: Grid) -> torch.Tensor:
    """grid_size [n, 2] of grids given as (rows, columns)."""
    return torch.tensor([[columns, rows] for rows, columns in grids], dtype=torch.float32)


def padded(grids: list[Grid], maps: list[torch.Tensor], bins: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory [n, longest, C] and pooling matrices [n, Q, longest], both padded with zeros."""
    longest = max(rows * columns for rows, columns in grids)
    memory = torch.stack([F.pad(each, (0, 0, 0, longest - len(each))) for each in maps])
    matrices = [F.pad(pooling_matrix(grid, bins), (0, longest - grid[0] * grid[1])) for grid in grids]
    return memory, torch.stack(matrices)


@pytest.fixture(scope="module")
def golden_adt(mome_case: Any) -> tuple[Any, Adt, dict[str, torch.Tensor]]:
    case = mome_case("adt")
    about = case.about
    adt = Adt(32, 256, AdtConfig(about["arguments"]["num_layers"], about["heads"], about["points"], about["ffn"]))
    official.fill(adt, official.adt(case.tensors("state_dict.safetensors")))
    return case, adt, case.tensors("inputs.safetensors")


def test_every_grid_equals_the_authors(golden_adt: Any) -> None:
    case, adt, inputs = golden_adt
    assert len(case.about["grids_h_w"]) >= 3
    for rows, columns in case.about["grids_h_w"]:
        name = f"{rows}x{columns}"
        memory = inputs[f"memory.{name}"]
        pooled = pool(memory, (rows, columns), BINS)
        torch.testing.assert_close(pooling_matrix((rows, columns), BINS) @ memory, pooled, atol=1e-6, rtol=0)
        if f"pooled.{name}" in case.expected:
            torch.testing.assert_close(pooled, case.expected[f"pooled.{name}"], atol=1e-6, rtol=0)
        case.close(adt(pooled, memory, sizes((rows, columns))), f"output.{name}")


def test_a_padded_batch_equals_the_authors_loop(golden_adt: Any) -> None:
    """Two grids in one call; garbage in the padding changes nothing."""
    case, adt, inputs = golden_adt
    grids = [tuple(grid) for grid in inputs["spatial_shapes.batch"].int().tolist()]
    assert grids == [tuple(grid) for grid in case.about["batch_grids_h_w"]]
    memory = inputs["memory.batch"]
    maps = [memory[row, : h * w] for row, (h, w) in enumerate(grids)]
    again, matrices = padded(grids, maps, BINS)
    assert torch.equal(again, memory)
    for garbage in (0.0, 1e6):
        for row, (h, w) in enumerate(grids):
            memory[row, h * w :] = garbage
        case.close(adt(matrices @ again, memory, sizes(*grids)), "output.batch")


def test_coordinates_are_not_swapped(golden_adt: Any) -> None:
    """Proof that the tests above can fail: width for height, or reference points 'repaired', give other numbers."""
    case, adt, inputs = golden_adt
    memory = inputs["memory.12x33"]
    pooled = pool(memory, (12, 33), BINS)
    expected = case.expected["output.12x33"]
    assert float((adt(pooled, memory, sizes((33, 12))) - expected).abs().max()) > 0.1
    stored = adt.reference_points.data
    try:
        adt.reference_points.data = stored.flip(-1)
        assert float((adt(pooled, memory, sizes((12, 33))) - expected).abs().max()) > 0.1
    finally:
        adt.reference_points.data = stored


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bins=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    images=st.integers(1, 2),
)
def test_pooling_is_adaptive_average_pooling_for_any_grid(grid: Grid, bins: Grid, images: int) -> None:
    maps = torch.randn(images, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(grid[0]))
    expected = F.adaptive_avg_pool2d(maps.transpose(1, 2).reshape(images, 3, *grid), bins).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool(maps, grid, bins), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooling_matrix(grid, bins) @ maps, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 2048), (2048, 1), (14, 143), (783, 2), (45, 45)])
def test_pooling_of_extreme_strips(grid: Grid) -> None:
    maps = torch.randn(1, grid[0] * grid[1], 2, generator=torch.Generator().manual_seed(1))
    expected = F.adaptive_avg_pool2d(maps.transpose(1, 2).reshape(1, 2, *grid), BINS).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooling_matrix(grid, BINS) @ maps, expected, atol=1e-6, rtol=1e-5)


@given(length=st.integers(1, 300), bins=st.integers(1, 40))
def test_every_bin_is_a_mean_and_every_place_is_in_some_bin(length: int, bins: int) -> None:
    matrix = side_matrix(length, bins)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(bins), atol=1e-5, rtol=0)
    assert (matrix.sum(dim=0) > 0).all()


def test_twice_the_grid_is_the_mean_of_two_by_two() -> None:
    """DINOv2's case (spec 1.1)."""
    maps = torch.randn(1, 32 * 32, 4, generator=torch.Generator().manual_seed(2))
    expected = maps.view(1, 16, 2, 16, 2, 4).mean(dim=(2, 4)).view(1, 256, 4)
    torch.testing.assert_close(pool(maps, (32, 32), BINS), expected, atol=1e-6, rtol=1e-5)


TINY = AdtConfig(num_layers=2, num_heads=2, num_points=3, ffn_dim=7)
CHANNELS, QUERY_GRID = 6, (2, 3)


@pytest.fixture(scope="module")
def tiny() -> Adt:
    adt = Adt(CHANNELS, 6, TINY)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adt.named_parameters():
        shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5 + shift
    adt.reference_points.data = torch.rand(1, 6, 2, generator=generator) * 1.4 - 0.2
    return adt.eval().requires_grad_(False)


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * norm.weight.numpy() + norm.bias.numpy()


def linear(x: np.ndarray, layer: torch.nn.Linear, rows: slice = slice(None)) -> np.ndarray:
    return x @ layer.weight.numpy()[rows].T.astype(np.float64) + layer.bias.numpy()[rows]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(adt: Adt, pooled: np.ndarray, memory: np.ndarray, grid: Grid) -> np.ndarray:
    """Spec 1.1 for one picture in float64, sampled through torch's grid_sample on locations in units of the map."""
    heads, points, width = TINY.num_heads, TINY.num_points, CHANNELS // TINY.num_heads
    positions, x = adt.position_embeddings[0].numpy().astype(np.float64), pooled.astype(np.float64)
    scale = np.array([grid[1], grid[0]], np.float64)
    for layer in adt.layers:
        qk, placed = layer.self_attn.qk_proj, x + positions
        q, k = linear(placed, qk, slice(CHANNELS)), linear(placed, qk, slice(CHANNELS, None))
        v = linear(x, layer.self_attn.v_proj)
        cut = [slice(h * width, (h + 1) * width) for h in range(heads)]
        mixed = [softmax(q[:, c] @ k[:, c].T / np.sqrt(width)) @ v[:, c] for c in cut]
        x = layer_norm(x + linear(np.concatenate(mixed, axis=1), layer.self_attn.out_proj), layer.self_attn_layer_norm)
        cross, placed = layer.encoder_attn, x + positions
        offsets = linear(placed, cross.sampling_offsets).reshape(-1, heads, points, 2)
        weights = softmax(linear(placed, cross.attention_weights).reshape(-1, heads, points))
        values = linear(memory.astype(np.float64), cross.value_proj)
        places = adt.reference_points[0].numpy()[:, None, None] + offsets / scale
        sampled = []
        for head, channels in enumerate(cut):
            maps = torch.from_numpy(values[:, channels].T.reshape(1, width, *grid).copy())
            where = torch.from_numpy(2 * places[None, :, head] - 1)
            each = F.grid_sample(maps, where, padding_mode="zeros", align_corners=False)[0].numpy()
            sampled.append((each * weights[None, :, head]).sum(axis=-1).T)
        x = layer_norm(x + linear(np.concatenate(sampled, axis=1), cross.output_proj), layer.encoder_attn_layer_norm)
        x = layer_norm(x + linear(np.maximum(linear(x, layer.fc1), 0), layer.fc2), layer.final_layer_norm)
    return x


@settings(deadline=None, derandomize=True, max_examples=20)
@given(grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_padded_batch_equals_each_picture_alone_equals_the_definition(
    tiny: Adt, grids: list[Grid], seed: int
) -> None:
    """For any grids, smaller than the queries' as well."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(rows * columns, CHANNELS, generator=generator) for rows, columns in grids]
    memory, matrices = padded(grids, maps, QUERY_GRID)
    together = tiny(matrices @ memory, memory, sizes(*grids))
    for row, (grid, features) in enumerate(zip(grids, maps, strict=True)):
        pooled = pool(features[None], grid, QUERY_GRID)
        alone = tiny(pooled, features[None], sizes(grid))
        np.testing.assert_allclose(together[row], alone[0], atol=2e-4)
        np.testing.assert_allclose(alone[0], by_hand(tiny, pooled[0].numpy(), features.numpy(), grid), atol=2e-4)
