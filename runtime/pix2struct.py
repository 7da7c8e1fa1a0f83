"""Pictures as patches of their own aspect ratio, and the matrix that pools any grid to the query grid (spec mome.md, 2)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moiie_runtime.errors import MoiieError
from moiie_runtime.vision_settings import PatchSettings

Floats = NDArray[np.float32]

_BAND_PIXELS = 2**22


def patch_inputs(image: Image.Image, settings: PatchSettings) -> dict[str, Floats]:
    """What a patch encoder is fed for one picture. Only real patches: none is padding.

    Args:
        image: RGB, of any size and aspect ratio.
        settings: patch size, most patches, and the query grid.

    Returns:
        `flattened_patches` [1, rows * columns, 2 + 3 * patch_size**2], `pool_matrix` [1, queries, rows * columns] and
        `grid_size` [1, 2] (width and height in patches), float32.

    Raises:
        MoiieError: the picture is so elongated that the encoder has no position for its last patches.
    """
    rows, columns = patch_grid(image.size, settings.patch_size, settings.max_patches)
    if settings.positions is not None and max(rows, columns) >= settings.positions:
        raise MoiieError(
            f"the picture of {image.width} x {image.height} pixels takes {rows} x {columns} patches, "
            f"but the encoder knows {settings.positions - 1} rows and columns",
            "cut it into parts that are less elongated",
        )
    return {
        "flattened_patches": flattened_patches(image, settings)[None],
        "pool_matrix": pool_matrix((rows, columns), settings.query_grid)[None],
        "grid_size": np.array([[columns, rows]], np.float32),
    }


def patch_grid(size: tuple[int, int], patch_size: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture [width, height]: its aspect ratio, and as many as are allowed."""
    width, height = size
    # Rounded down at each step as the authors do: another order of the factors gives another grid now and then.
    scale = math.sqrt(max_patches * (patch_size / height) * (patch_size / width))
    rows = max(min(math.floor(scale * height / patch_size), max_patches), 1)
    columns = max(min(math.floor(scale * width / patch_size), max_patches), 1)
    return rows, columns


def flattened_patches(image: Image.Image, settings: PatchSettings) -> Floats:
    """The picture standardised, resized to whole patches and cut into them.

    Args:
        image: RGB.
        settings: patch size and most patches.

    Returns:
        float32 [rows * columns, 2 + 3 * patch_size**2]: 1-based row and column, then the pixels in the order
        (patch row, patch column, channel).
    """
    size = settings.patch_size
    rows, columns = patch_grid(image.size, size, settings.max_patches)
    pixels = resize_standardised(image, (rows * size, columns * size))
    patches = pixels.reshape(3, rows, size, columns, size).transpose(1, 3, 2, 4, 0)
    result = np.empty((rows * columns, 2 + 3 * size * size), np.float32)
    result[:, 0] = np.repeat(np.arange(1, rows + 1), columns)
    result[:, 1] = np.tile(np.arange(1, columns + 1), rows)
    result[:, 2:] = patches.reshape(rows * columns, -1)
    return result


def pool_matrix(grid: tuple[int, int], query_grid: tuple[int, int]) -> Floats:
    """Adaptive average pooling as a matrix.

    Along each axis, bin i of n over `size` rows is the mean of rows floor(i * size / n) to ceil((i + 1) * size / n) - 1:
    bins may overlap, and repeat rows where there are fewer rows than bins.

    Args:
        grid: rows and columns of the map, each at least 1.
        query_grid: rows and columns of the result.

    Returns:
        float32 [query rows * query columns, rows * columns], for a map in row-major order.
    """
    rows, columns = (_bins(size, count) for size, count in zip(grid, query_grid, strict=True))
    return np.kron(rows, columns).astype(np.float32)


def resize_standardised(image: Image.Image, size: tuple[int, int]) -> Floats:
    """The picture less the mean of all its values, divided by their standard deviation, and resized.

    The deviation is at least 1 / sqrt(values). The resize is PyTorch's bilinear one with antialiasing and
    `align_corners=False`: a triangle as wide as two source pixels, or two target pixels where those are larger.

    Args:
        image: RGB.
        size: height and width of the result.

    Returns:
        float32 [3, height, width].
    """
    levels = _standardised_levels(image)
    width, height = image.size
    result = np.empty((3, *size), np.float32)
    rows = max(1, _BAND_PIXELS // width)
    for channel in range(3):
        plane = image.getchannel(channel)
        # Along x first, in bands of rows: a large photograph never becomes floats as a whole.
        columns = np.empty((height, size[1]), np.float32)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            band = levels[np.asarray(plane.crop((0, start, width, stop)))]
            columns[start:stop] = _bilinear(band, (stop - start, size[1]))
        result[channel] = _bilinear(columns, size)
    return result


def _bilinear(values: Floats, size: tuple[int, int]) -> Floats:
    """Pillow's resize of a float picture [height, width] has the same weights as PyTorch's with antialiasing."""
    image = Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32)


def _standardised_levels(image: Image.Image) -> Floats:
    """The standardised value of each of the 256 levels; sums are exact integers, whatever the picture's size."""
    histogram = image.histogram()
    counts = [sum(histogram[level::256]) for level in range(256)]
    values = sum(counts)
    first = sum(level * count for level, count in enumerate(counts))
    second = sum(level * level * count for level, count in enumerate(counts))
    deviation = math.sqrt(values * second - first * first) / values
    scale = max(deviation, 1 / math.sqrt(values))
    return ((np.arange(256) - first / values) / scale).astype(np.float32)


def _bins(size: int, count: int) -> NDArray[np.float64]:
    """Averages [count, size] of adaptive pooling along one axis."""
    index = np.arange(count)[:, None]
    starts, stops = index * size // count, -(-(index + 1) * size // count)
    positions = np.arange(size)
    inside = ((positions >= starts) & (positions < stops)).astype(np.float64)
    averages: NDArray[np.float64] = inside / inside.sum(axis=1, keepdims=True)
    return averages
