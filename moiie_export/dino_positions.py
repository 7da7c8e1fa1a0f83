"""DINOv2's position table resized to another grid as its authors do it, once, at conversion (spec mome.md, 2).

Their code resizes by the scale factor (grid + 0.1) / stored grid instead of to a size, so sample points lie as if the
target were a tenth of a patch larger. Resizing to the size gives other numbers: 0.14 off on a table of 0.85.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moiie_runtime.errors import MoiieError

if TYPE_CHECKING:
    import numpy as np

OFFSET = 0.1
_SHARPNESS = -0.75
"""Keys' parameter; the value PyTorch's bicubic resize has."""


def resize_positions(table: np.ndarray, grid: int) -> np.ndarray:
    """Bring a table to `grid` x `grid` patches; the class token's row stays.

    Args:
        table: [1, 1 + stored grid squared, C].
        grid: patches along one side.

    Returns:
        [1, 1 + grid squared, C] float32; the table itself where it has that grid already.

    Raises:
        MoiieError: the rows behind the first are no square.
    """
    import numpy as np

    rows = table.shape[1] - 1
    stored = round(rows**0.5)
    if rows < 1 or stored**2 != rows:
        raise MoiieError(
            f"the position table has {rows} rows behind the class token's, expected a square number",
            "give the tower's weights as its authors publish them",
        )
    table = table.astype(np.float32)
    if stored == grid:
        return table
    matrix = _side(stored, grid)
    square = table[:, 1:].reshape(stored, stored, -1)
    resized = np.einsum("ik,jl,klc->ijc", matrix, matrix, square, optimize=True).astype(np.float32)
    return np.concatenate([table[:, :1], resized.reshape(1, grid * grid, -1)], axis=1)


def _side(stored: int, grid: int) -> np.ndarray:
    """One side's weights [grid, stored] in float64: four taps a point, borders repeated, no antialiasing."""
    import numpy as np

    points = (np.arange(grid) + 0.5) * stored / (grid + OFFSET) - 0.5
    matrix = np.zeros((grid, stored))
    for tap in range(-1, 3):
        column = np.floor(points).astype(np.int64) + tap
        np.add.at(matrix, (np.arange(grid), column.clip(0, stored - 1)), _cubic(np.abs(points - column)))
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel at distances below 2."""
    import numpy as np

    a = _SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far: np.ndarray = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)
