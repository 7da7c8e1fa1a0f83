"""DINOv2 without registers: patch tokens behind the final norm (spec mome.md, 2)."""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.model.mome.transformer import EncoderLayer
from moiie_export.model.patches import embed_patches, run_layers
from moiie_export.mome_config import DinoConfig


class DinoEmbeddings(nn.Module):
    """Class token and patches, plus positions that a conversion has already resized to this tower's grid."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.grid**2, size))
        self.patch_projection = nn.Conv2d(3, size, patch, stride=patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # [n, 3, S, S] -> [n, 1 + P, C]
        """Embeddings, class token first, patches in row-major order."""
        return embed_patches(pixels, self.patch_projection, self.cls_token, self.position_embeddings)


class DinoTower(nn.Module):
    """The tower; its class token only takes part in attention."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.embeddings = DinoEmbeddings(config)
        sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(*sizes, scaled=True) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixel_values [n, 3, S, S] -> patch tokens [n, P, C] in row-major order."""
        return self.layernorm(run_layers(self.layers, self.embeddings(pixels))[:, 1:])
