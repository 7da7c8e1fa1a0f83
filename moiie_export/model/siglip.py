"""SigLIP tower up to the selected hidden state, run on one or several scales (spec moiie.md, 1.1 and 1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.model.patches import run_layers
from moiie_export.model_config import VisionConfig


class Embeddings(nn.Module):
    """Patches by an unpadded convolution, plus a learned position each; no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.image_tokens, config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # [n, 3, S, S] -> [n, P, C]
        """Patch embeddings in row-major order."""
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Full attention over the patches of one picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor, images: int) -> torch.Tensor:  # [n * P, C] -> [n * P, C]
        """Attention output."""
        query, key, value = (
            project(x).view(images, -1, self.heads, x.shape[1] // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n * P, C] -> [n * P, C]
        """Feed-forward output."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(config), Mlp(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, images: int) -> torch.Tensor:  # [n * P, C] -> [n * P, C]
        """Residual stream behind the layer."""
        x = x + self.self_attn(self.layer_norm1(x), images)
        return x + self.mlp(self.layer_norm2(x))


class SiglipTower(nn.Module):
    """The tower; only the layers up to the selected hidden state exist, the rest of the checkpoint is never used."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers_used))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixel_values [n, 3, S, S] -> features [n, P, C * scales]."""
        if not self.config.scales:
            return self._encode(pixels)
        features = [self._scale(pixels, scale) for scale in self.config.scales]
        return torch.cat(features, dim=2)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:  # [n, 3, S, S] -> [n, P, C]
        return run_layers(self.layers, self.embeddings(pixels))

    def _scale(self, pixels: torch.Tensor, scale: int) -> torch.Tensor:
        """One S2 scale: resize, cut into tiles of the tower's size, encode, put together, average down."""
        config, images = self.config, pixels.shape[0]
        if scale != config.input_size:
            pixels = F.interpolate(pixels, size=(scale, scale), mode="bicubic", align_corners=False)
        n, side, grid = scale // config.image_size, config.image_size, config.grid
        tiles = pixels.view(images, 3, n, side, n, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, side, side)
        encoded = self._encode(tiles).view(images, n, n, grid, grid, config.hidden_size)
        chessboard = encoded.permute(0, 5, 1, 3, 2, 4).reshape(images, config.hidden_size, n * grid, n * grid)
        pooled = F.avg_pool2d(chessboard, n) if n > 1 else chessboard
        return pooled.flatten(2).transpose(1, 2)
