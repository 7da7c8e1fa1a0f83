"""Patches, grids and pooling against the authors' processor, and against PyTorch where it states the same rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moiie_runtime import pix2struct
from moiie_runtime.errors import MoiieError
from moiie_runtime.images import load_image, pixel_values
from moiie_runtime.pix2struct import flattened_patches, patch_grid, patch_inputs, pool_matrix, resize_standardised
from moiie_runtime.vision_settings import ImageSettings, PatchSettings
from tests.conftest import GoldenCase

PREPROCESS, END_TO_END = GoldenCase("mome/preprocess"), GoldenCase("mome/end_to_end")
PATCHES = PatchSettings(patch_size=16, max_patches=2048, query_grid=(16, 16))
CLIP = ImageSettings(
    224, "square", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1 / 255, "bicubic"
)
DINO = ImageSettings(448, "square", CLIP.mean, CLIP.std, CLIP.rescale_factor, CLIP.resample)

GOLDEN = {
    "a": (PREPROCESS, "inputs/a.png", PREPROCESS.about["per_image"]["a"]),
    "b": (PREPROCESS, "inputs/b.png", PREPROCESS.about["per_image"]["b"]),
    "sample0": (END_TO_END, "inputs/image_0.png", END_TO_END.about["preprocessing"]["sample0"]),
    "sample1": (END_TO_END, "inputs/image_1.png", END_TO_END.about["preprocessing"]["sample1"]),
}


@pytest.fixture(params=GOLDEN)
def golden_picture(request):
    case, path, about = GOLDEN[request.param]
    prefix = {"sample0": "pre"}.get(request.param, request.param)
    return case, prefix, load_image(case.path / path), about


def test_patches_equal_the_authors(golden_picture):
    case, prefix, image, about = golden_picture
    found = flattened_patches(image, PATCHES)
    assert found.dtype == np.float32
    assert list(found.shape) == [about["real_rows"], about["flattened_patches_shape"][1]]
    rows, columns = about["grid_rows_cols"]
    assert patch_grid(image.size, 16, 2048) == (rows, columns)
    np.testing.assert_array_equal(found[:, 0], np.repeat(np.arange(1, rows + 1), columns))
    np.testing.assert_array_equal(found[:, 1], np.tile(np.arange(1, columns + 1), rows))
    if f"{prefix}.flattened_rows" in case.expected:
        expected = case.expected[f"{prefix}.flattened_patches"]
        np.testing.assert_allclose(found[case.expected[f"{prefix}.flattened_rows"]], expected, atol=5e-5)
    assert found.sum(dtype=np.float64) == pytest.approx(about["sum"], abs=1)
    assert np.abs(found).sum(dtype=np.float64) == pytest.approx(about["abs_sum"], abs=1)


def test_squashed_pictures_equal_the_authors_bit_for_bit(golden_picture):
    case, prefix, image, about = golden_picture
    for name, how, stride in (("clip", CLIP, 4), ("dino", DINO, 8)):
        [found] = pixel_values([image], how)
        assert list(found.shape) == about[f"{name}_image"]["shape"]
        assert found.sum(dtype=np.float64) == about[f"{name}_image"]["sum"]
        expected = case.expected.get(f"{prefix}.{name}_image_stride{stride}")
        if expected is not None:
            np.testing.assert_array_equal(found[:, ::stride, ::stride], expected)


@pytest.mark.parametrize(("size", "grid"), PREPROCESS.about["grid_of_official_helper_by_width_x_height"].items())
def test_grids_equal_the_authors(size, grid):
    width, height = map(int, size.split("x"))
    assert list(patch_grid((width, height), 16, 2048)) == grid


@given(width=st.integers(1, 13000), height=st.integers(1, 13000), most=st.integers(1, 4096))
def test_a_grid_has_at_least_one_patch_and_never_too_many(width, height, most):
    rows, columns = patch_grid((width, height), 16, most)
    assert rows >= 1 <= columns
    assert rows * columns <= most


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.tuples(st.integers(1, 120), st.integers(2, 120)),  # PyTorch 2.13 is wrong for a width of 1
    band=st.integers(1, 3000),
    seed=st.integers(0, 9),
)
def test_resizing_equals_pytorch_with_antialiasing(width, height, size, band, seed):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    values = array.astype(np.float64)
    values = (values - values.mean()) / max(values.std(), 1 / np.sqrt(values.size))
    planes = torch.from_numpy(values).permute(2, 0, 1)[None]
    [expected] = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pix2struct, "_BAND_PIXELS", band)
        found = resize_standardised(load_image(array), size)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_picture_of_one_colour_is_zero(level):
    found = flattened_patches(Image.new("RGB", (50, 31), (level, level, level)), PATCHES)
    assert not found[:, 2:].any()


def test_the_deviation_is_bounded_from_below():
    found = resize_standardised(load_image(np.array([[[7, 7, 8]]], np.uint8)), (1, 1))
    np.testing.assert_allclose(found.ravel(), np.array([-1, -1, 2]) / 3 * np.sqrt(3), rtol=1e-6)


def test_pixels_of_a_patch_are_in_the_order_row_column_channel():
    patches = PatchSettings(patch_size=2, max_patches=6, query_grid=(1, 1))
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = load_image(array)
    assert patch_grid(image.size, 2, 6) == (2, 3)  # no resize: patches are cuts of the picture
    found, values = flattened_patches(image, patches), resize_standardised(image, (4, 6))
    np.testing.assert_array_equal(found[4], [2, 2, *values[:, 2:4, 2:4].transpose(1, 2, 0).ravel()])


@pytest.mark.parametrize("grid", [(1, 1), (12, 170), (1, 2048), (45, 45), (71, 28), (16, 16), (32, 32), (3, 5)])
@pytest.mark.parametrize("queries", [(16, 16), (2, 2), (3, 5)])
def test_pooling_equals_adaptive_average_pooling(grid, queries):
    features = np.random.default_rng(0).standard_normal((4, *grid)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(features), queries).reshape(4, -1)
    matrix = pool_matrix(grid, queries)
    assert matrix.shape == (queries[0] * queries[1], grid[0] * grid[1])
    np.testing.assert_allclose(matrix @ features.reshape(4, -1).T, expected.numpy().T, atol=1e-5)


def test_pooling_equals_the_authors():
    found = pool_matrix((37, 55), (16, 16)) @ END_TO_END.expected["pix.last_hidden_state"]
    np.testing.assert_allclose(found, END_TO_END.expected["pix.pooled"], atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(5, 3), (1, 1), (1000, 100), (100, 1000), (1, 13000)])
def test_small_and_extreme_pictures_have_inputs_that_fit_each_other(width, height):
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    inputs = patch_inputs(image, PATCHES)
    rows, columns = patch_grid((width, height), 16, 2048)
    np.testing.assert_array_equal(inputs["grid_size"], [[columns, rows]])
    assert inputs["flattened_patches"].shape == (1, rows * columns, 770)
    assert inputs["pool_matrix"].shape == (1, 256, rows * columns)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in inputs.values())
    np.testing.assert_allclose(inputs["pool_matrix"].sum(axis=2), 1, rtol=1e-6)


@pytest.mark.parametrize("size", [(640, 4), (4, 640)])
def test_a_strip_beyond_the_position_tables_is_refused(size: tuple[int, int]) -> None:
    patches = PatchSettings(patch_size=4, max_patches=64, query_grid=(2, 2), positions=17)
    patch_inputs(Image.new("RGB", (64, 64)), patches)
    with pytest.raises(MoiieError, match=r"patches, but the encoder knows 16 rows and columns"):
        patch_inputs(Image.new("RGB", size), patches)
