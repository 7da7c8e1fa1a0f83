"""Adaptive average pooling to a fixed grid as products with matrices (spec mome.md, 1.1 and 6.2).

Bin i of b over a side of length s covers floor(i * s / b) up to ceil((i + 1) * s / b): bins overlap where b does not
divide s, and repeat where s < b. No exporter takes such sizes as a pooling layer.
"""

from __future__ import annotations

import torch


def side_matrix(length: int, bins: int, device: torch.device | None = None) -> torch.Tensor:
    """Averages of one side: [bins, length], every row sums to 1. Computed, so that tracing needs no stored constant."""
    number = torch.arange(bins, device=device).unsqueeze(1)
    place = torch.arange(length, device=device).unsqueeze(0)
    first = number * length // bins
    end = ((number + 1) * length + bins - 1) // bins
    inside = (place >= first) & (place < end)
    return inside.float() / (end - first).float()


def pool(features: torch.Tensor, grid: tuple[int, int], bins: tuple[int, int]) -> torch.Tensor:
    """Row-major maps [n, grid[0] * grid[1], C] -> [n, bins[0] * bins[1], C], one side after the other."""
    images, _, channels = features.shape
    rows = side_matrix(grid[0], bins[0], features.device)
    columns = side_matrix(grid[1], bins[1], features.device)
    down = rows @ features.reshape(images, grid[0], grid[1] * channels)
    across = columns @ down.view(images, bins[0], grid[1], channels)
    return across.view(images, bins[0] * bins[1], channels)
