"""EVA ViT as BLIP-2 uses it: all tokens of the last layer but one, without a final norm (spec mome.md, 2).

The checkpoint's layers are those that exist: the original tower's last one is dropped before. Queries and values have a
bias, keys have none; the fused bias holds zeros for the keys.
"""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.model.mome.transformer import EncoderLayer
from moiie_export.model.patches import embed_patches, run_layers
from moiie_export.mome_config import EvaConfig


class EvaEmbeddings(nn.Module):
    """Class token and patches, plus a learned position each."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, size))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.grid**2, size))
        self.patch_embedding = nn.Conv2d(3, size, patch, stride=patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # [n, 3, S, S] -> [n, 1 + P, C]
        """Embeddings, class token first, patches in row-major order."""
        return embed_patches(pixels, self.patch_embedding, self.class_embedding, self.position_embedding)


class EvaTower(nn.Module):
    """The tower; its class token is kept."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.embeddings = EvaEmbeddings(config)
        sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(*sizes, scaled=False) for _ in range(config.num_hidden_layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixel_values [n, 3, S, S] -> residual stream behind the last layer [n, 1 + P, C]."""
        return run_layers(self.layers, self.embeddings(pixels))
