"""What calibration knows of a layer's inputs, and the error that a changed weight makes on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moiie_runtime.errors import MoiieError

Float32 = npt.NDArray[np.float32]

MAX_SAMPLE = 512
"""Rows of input kept as they are."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of the rows x [K] that reached a layer; for an expert, of the tokens routed to it.

    Attributes:
        tokens: how many rows there were.
        mean_abs: float32 [K], mean |x|.
        gram: float32 [K, K], sum of x x^T over `tokens`; None where K is too large to keep it.
        sample: float32 [n <= 512, K], some of the rows.

    Raises:
        MoiieError: shapes that do not belong together.
    """

    tokens: int
    mean_abs: Float32
    gram: Float32 | None
    sample: Float32

    def __post_init__(self) -> None:
        width = self.columns
        square = self.gram is None or self.gram.shape == (width, width)
        if self.mean_abs.ndim != 1 or not square or self.sample.ndim != 2 or self.sample.shape[1] != width:
            gram = None if self.gram is None else self.gram.shape
            raise MoiieError(
                f"input statistics: mean_abs {self.mean_abs.shape}, gram {gram} and sample {self.sample.shape}"
                " are not of one width"
            )

    @property
    def columns(self) -> int:
        """K, the width of the layer's input."""
        return int(self.mean_abs.shape[0])

    @property
    def usable(self) -> bool:
        """Whether a method can weigh errors with it."""
        return self.tokens > 0 and (self.gram is not None or len(self.sample) > 0)

    def check(self, columns: int, name: str) -> None:
        """Refuse statistics of another layer's input.

        Raises:
            MoiieError: naming the tensor, when its rows are not of this width.
        """
        if columns != self.columns:
            raise MoiieError(f"{name}: rows of {columns}, but the statistics are of inputs of {self.columns}")

    def divided(self, scale: Float32) -> InputStatistics:
        """The statistics of the same inputs when each channel is divided by its `scale` [K] > 0."""
        inverse: Float32 = np.float32(1) / scale.astype(np.float32)
        gram = None if self.gram is None else self.gram * inverse * inverse[:, None]
        return InputStatistics(self.tokens, self.mean_abs * inverse, gram, self.sample * inverse)

    def group_moments(self, size: int) -> Float32:
        """float32 [K/size, size, size]: the blocks on the diagonal of `second_moment`, without the rest of it."""
        if self.gram is not None:
            starts = range(0, self.columns, size)
            return np.stack([self.gram[start : start + size, start : start + size] for start in starts])
        grouped = self.sample.reshape(len(self.sample), -1, size).transpose(1, 0, 2)
        blocks: Float32 = grouped.transpose(0, 2, 1) @ grouped / np.float32(max(1, len(self.sample)))
        return blocks

    def second_moment(self) -> Float32:
        """float32 [K, K], mean of x x^T: the gram, or the sample's where there is none."""
        if self.gram is not None:
            return self.gram
        moment: Float32 = self.sample.T @ self.sample
        moment /= max(1, len(self.sample))
        return moment

    def output_error(self, change: Float32) -> Float32:
        """Mean squared change of each output when the weight changes.

        Args:
            change: float32 [N, K], changed weight minus weight.

        Returns:
            float32 [N], mean over the inputs of (x . change_n)^2; never negative.
        """
        if self.gram is not None:
            error = np.einsum("nk,nk->n", change @ self.gram, change)
        else:
            error = np.square(change @ self.sample.T).sum(axis=1) / max(1, len(self.sample))
        positive: Float32 = np.maximum(error, 0).astype(np.float32)
        return positive
