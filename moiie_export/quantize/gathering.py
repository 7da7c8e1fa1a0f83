"""Adding up what reaches a layer, batch by batch, into `InputStatistics`."""

from __future__ import annotations

import numpy as np
import torch

from moiie_export.quantize.statistics import MAX_SAMPLE, Float32, InputStatistics


class Gathering:
    """Running sums of the rows that reached one layer.

    The sample is evenly spread over all rows whatever their number, and the same for the same rows however they are
    cut into batches: every row while there is room, then every second, every fourth, ...

    Args:
        columns: K, the layer's input width.
        gram: also sum x x^T, float32 [K, K].
    """

    def __init__(self, columns: int, *, gram: bool) -> None:
        self.tokens = 0
        self._total = torch.zeros(columns, dtype=torch.float64)
        self._gram = torch.zeros(columns, columns) if gram else None
        self._sample: list[Float32] = []
        self._stride = 1

    def add(self, rows: torch.Tensor) -> None:
        """Count rows [n, K] in."""
        if not len(rows):
            return
        rows = rows.float()
        self._total += rows.abs().sum(0, dtype=torch.float64)
        if self._gram is not None:
            self._gram.addmm_(rows.T, rows)
        first = -self.tokens % self._stride
        self._sample += list(rows[first :: self._stride].numpy().copy())
        self.tokens += len(rows)
        while len(self._sample) > MAX_SAMPLE:
            self._sample, self._stride = self._sample[::2], 2 * self._stride

    def statistics(self) -> InputStatistics:
        """What was gathered; no rows at all give zeros and an empty sample."""
        count = max(1, self.tokens)
        mean: Float32 = (self._total / count).float().numpy()
        gram = None if self._gram is None else (self._gram / count).numpy()
        sample = np.stack(self._sample) if self._sample else np.empty((0, len(mean)), np.float32)
        return InputStatistics(self.tokens, mean, gram, sample)
