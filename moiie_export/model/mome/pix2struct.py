"""Pix2Struct's vision encoder on real patches alone (spec mome.md, 2).

Without padding rows there is nothing to mask, and the numbers are those of the padded run. Pictures of one call have
the same number of patches, whatever their grids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.model.layers import RMSNorm
from moiie_export.model.mome.transformer import SelfAttention
from moiie_export.mome_config import Pix2StructConfig

ID_COLUMNS = 2
"""Columns of a flattened patch in front of its pixels: row and column in the grid, counted from 1."""


class PatchEmbeddings(nn.Module):
    """Pixels by a linear layer, plus an embedding each for row and column."""

    def __init__(self, config: Pix2StructConfig) -> None:
        super().__init__()
        self.row_embedder = nn.Embedding(config.seq_len, config.hidden_size)
        self.column_embedder = nn.Embedding(config.seq_len, config.hidden_size)
        self.patch_projection = nn.Linear(3 * config.patch_size**2, config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:  # [N, 2 + 3 * patch ** 2] -> [N, C]
        """Embeddings of any number of patches."""
        rows = self.row_embedder(patches[:, 0].to(torch.int64))
        columns = self.column_embedder(patches[:, 1].to(torch.int64))
        return self.patch_projection(patches[:, ID_COLUMNS:]) + rows + columns


class GatedGelu(nn.Module):
    """Feed-forward gated by a tanh-approximated GELU, without biases; both inner projections fused in rows."""

    def __init__(self, config: Pix2StructConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, 2 * config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C] -> [N, C]
        """wo(gelu(wi_0 x) * wi_1 x)."""
        inner = self.wi(x)
        gate, up = inner[:, : self.wo.in_features], inner[:, self.wo.in_features :]
        return self.wo(F.gelu(gate, approximate="tanh") * up)


class Pix2StructLayer(nn.Module):
    """Pre-norm layer; scores are not divided by the root of the head's width."""

    def __init__(self, config: Pix2StructConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.pre_attention_layer_norm, self.pre_mlp_layer_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.attention = SelfAttention(size, config.num_attention_heads, config.d_kv, bias=False, scale=1.0)
        self.mlp = GatedGelu(config)

    def forward(self, x: torch.Tensor, images: int) -> torch.Tensor:  # [n * P, C] -> [n * P, C]
        """Residual stream behind the layer."""
        x = x + self.attention(self.pre_attention_layer_norm(x), images)
        return x + self.mlp(self.pre_mlp_layer_norm(x))


class Pix2StructTower(nn.Module):
    """The encoder with its final norm."""

    def __init__(self, config: Pix2StructConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.layers = nn.ModuleList(Pix2StructLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = RMSNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, flattened_patches: torch.Tensor) -> torch.Tensor:
        """flattened_patches [n, P, 2 + 3 * patch ** 2] -> features [n, P, C]."""
        images, patches, columns = flattened_patches.shape
        x = self.embeddings(flattened_patches.reshape(images * patches, columns))
        for layer in self.layers:
            x = layer(x, images)
        return self.layernorm(x).view(images, patches, -1)
