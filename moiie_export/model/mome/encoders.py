"""The vision experts: a tower, what brings its grid to the queries, a projector; and their weighted sum (spec mome.md, 1.2, 2).

Shape legend: n pictures, Q queries, C channels of the tower, H width of the decoder. Each forward returns image_features
first, then what the parity checks look at on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moiie_export.model.mome.adt import Adt
from moiie_export.model.mome.dinov2 import DinoTower
from moiie_export.model.mome.eva import EvaTower
from moiie_export.model.mome.pix2struct import Pix2StructTower
from moiie_export.model.mome.pooling import pool
from moiie_export.mome_config import DinoConfig, EvaConfig, MomeConfig, Pix2StructConfig, VisionExpert

Probed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _project(projector: nn.Linear, features: torch.Tensor) -> torch.Tensor:  # [n, Q, C] -> [n, Q, H]
    images, tokens, channels = features.shape
    return projector(features.reshape(images * tokens, channels)).view(images, tokens, -1)


class VisionClip(nn.Module):
    """EVA: its patches are the queries already, so a norm and a projector are all it takes; the class token comes first."""

    def __init__(self, config: MomeConfig, tower: EvaConfig) -> None:
        super().__init__()
        self.tower = EvaTower(tower)
        self.norm = nn.LayerNorm(tower.hidden_size, eps=tower.projector_norm_eps)
        self.projector = nn.Linear(tower.hidden_size, config.text.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixel_values [n, 3, S, S] -> image_features [n, 1 + Q, H]; the tower's own features [n, 1 + Q, C]."""
        features = self.tower(pixel_values)
        return _project(self.projector, self.norm(features)), features


class VisionDino(nn.Module):
    """DINOv2: patches are pooled to the queries, which the ADT refines."""

    def __init__(self, config: MomeConfig, tower: DinoConfig, adt: Adt) -> None:
        super().__init__()
        self.grid, self.query_grid = (tower.grid, tower.grid), config.query_grid
        self.tower, self.adt = DinoTower(tower), adt
        self.projector = nn.Linear(tower.hidden_size, config.text.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> Probed:
        """pixel_values [n, 3, S, S] -> image_features [n, Q, H]; patches [n, P, C], pooled and refined [n, Q, C]."""
        patches = self.tower(pixel_values)
        pooled = pool(patches, self.grid, self.query_grid)
        size = torch.full((patches.shape[0], 2), float(self.grid[0]), device=patches.device)
        refined = self.adt(pooled, patches, size)
        return _project(self.projector, refined), patches, pooled, refined


class VisionPix2Struct(nn.Module):
    """Pix2Struct: the grid differs from picture to picture, so pooling comes as a matrix that the host makes."""

    def __init__(self, config: MomeConfig, tower: Pix2StructConfig, adt: Adt) -> None:
        super().__init__()
        self.tower, self.adt = Pix2StructTower(tower), adt
        self.projector = nn.Linear(tower.hidden_size, config.text.hidden_size)

    def forward(self, flattened_patches: torch.Tensor, pool_matrix: torch.Tensor, grid_size: torch.Tensor) -> Probed:
        """Features of pictures with equally many patches.

        Args:
            flattened_patches: [n, P, 2 + 3 * patch ** 2], real patches only, row-major.
            pool_matrix: [n, Q, P], adaptive average pooling of each grid (moiie_runtime.pix2struct.pool_matrix).
            grid_size: [n, 2] float32, (width, height) in patches.

        Returns:
            image_features [n, Q, H]; the tower's own features [n, P, C], pooled and refined [n, Q, C].
        """
        patches = self.tower(flattened_patches)
        pooled = pool_matrix @ patches
        refined = self.adt(pooled, patches, grid_size)
        return _project(self.projector, refined), patches, pooled, refined


def vision_expert(config: MomeConfig, expert: VisionExpert) -> nn.Module:
    """The module of one expert, by the kind of its tower.

    Raises:
        TypeError: an ADT where the authors have none, or none where they have one; parsing refuses both.
    """
    tower, adt = expert.tower, expert.adt
    if isinstance(tower, EvaConfig) and adt is None:
        return VisionClip(config, tower)
    if isinstance(tower, DinoConfig) and adt is not None:
        return VisionDino(config, tower, Adt(tower.hidden_size, config.queries, adt))
    if isinstance(tower, Pix2StructConfig) and adt is not None:
        return VisionPix2Struct(config, tower, Adt(tower.hidden_size, config.queries, adt))
    raise TypeError(f"vision expert {expert.name}: {type(tower).__name__} {'with' if adt else 'without'} an ADT")


def weighted_sum(weights: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Equation (7): weights [n, E] and E tensors [n, Q, H] -> [n, Q, H], one weight a picture and expert."""
    gains = weights.unsqueeze(-1).unsqueeze(-1)
    return torch.stack([gains[:, index] * each for index, each in enumerate(features)]).sum(dim=0)


def visual_tokens(weights: torch.Tensor, features: Sequence[torch.Tensor], queries: int) -> torch.Tensor:
    """Rows of the decoder's input [n, 1 + Q, H].

    Args:
        weights: [n, E] of the router, in the order of `features`.
        features: image_features of each expert; the one with 1 + Q rows leads with its class token, which no weight
            touches (spec 1.2).
        queries: Q.
    """
    first = [each[:, :-queries] for each in features if each.shape[1] != queries]
    return torch.cat([*first, weighted_sum(weights, [each[:, -queries:] for each in features])], dim=1)
