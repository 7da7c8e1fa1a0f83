"""What vision towers share: patches with a class token in front, and a stack of layers over flat rows."""

from __future__ import annotations

import torch
from torch import nn


def embed_patches(
    pixels: torch.Tensor, projection: nn.Conv2d, class_token: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Embeddings [n, 1 + P, C] of pictures [n, 3, S, S], class token first, patches in row-major order.

    Args:
        pixels: pictures.
        projection: one patch to C channels.
        class_token: [1, 1, C].
        positions: [1, 1 + P, C].
    """
    patches = projection(pixels).flatten(2).transpose(1, 2)
    return torch.cat([class_token.expand(pixels.shape[0], -1, -1), patches], dim=1) + positions


def run_layers(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """x [n, P, C] through layers that take ([n * P, C], n), so that every linear layer is one matrix product."""
    images, tokens, channels = x.shape
    x = x.reshape(images * tokens, channels)
    for layer in layers:
        x = layer(x, images)
    return x.view(images, tokens, channels)
