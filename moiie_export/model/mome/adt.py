"""ADT: queries pooled from a map look at the whole map again by deformable sampling (spec mome.md, 1.1).

Shape legend: n pictures, Q queries, C channels, S rows of memory, h heads, D = C / h, P points a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.mome_config import AdtConfig
from moiie_export.ops.deformable_sample import deformable_sample

NORM_EPS = 1e-5
"""The authors take it from Deformable DETR and never configure it."""


class QueryAttention(nn.Module):
    """Self-attention of the queries; positions take part in queries and keys, not in values, hence two projections."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk_proj = nn.Linear(size, 2 * size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, placed: torch.Tensor, x: torch.Tensor, images: int) -> torch.Tensor:
        """placed (with positions) and x (without), both [n * Q, C] -> attention output [n * Q, C]."""
        heads, width = self.heads, x.shape[1] // self.heads
        query_key = self.qk_proj(placed).view(images, -1, 2 * heads, width).transpose(1, 2)
        value = self.v_proj(x).view(images, -1, heads, width).transpose(1, 2)
        out = F.scaled_dot_product_attention(query_key[:, :heads], query_key[:, heads:], value)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


class DeformableAttention(nn.Module):
    """Each query samples a few points of the map near its reference point.

    Offsets and weights stay two projections: offsets are coordinates, which half precision ruins.
    """

    def __init__(self, size: int, config: AdtConfig) -> None:
        super().__init__()
        self.heads, self.points = config.num_heads, config.num_points
        self.sampling_offsets = nn.Linear(size, self.heads * self.points * 2)
        self.attention_weights = nn.Linear(size, self.heads * self.points)
        self.value_proj, self.output_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(
        self, placed: torch.Tensor, memory: torch.Tensor, anchors: torch.Tensor, grid_size: torch.Tensor
    ) -> torch.Tensor:
        """placed [n * Q, C], memory [n, S, C], anchors [n, Q, 1, 1, 2] in pixels, grid_size [n, 2] -> [n * Q, C]."""
        images, rows, channels = memory.shape
        value = self.value_proj(memory.reshape(images * rows, channels))
        shape = (images, -1, self.heads, self.points)
        points = anchors + self.sampling_offsets(placed).view(*shape, 2)
        weights = self.attention_weights(placed).view(*shape).softmax(dim=-1)
        sampled = deformable_sample(value.view(images, rows, self.heads, -1), points, weights, grid_size)
        return self.output_proj(sampled.reshape(-1, channels))


class AdtLayer(nn.Module):
    """Post-norm: self-attention, deformable attention, a ReLU network."""

    def __init__(self, size: int, config: AdtConfig) -> None:
        super().__init__()
        self.self_attn = QueryAttention(size, config.num_heads)
        self.encoder_attn = DeformableAttention(size, config)
        self.fc1, self.fc2 = nn.Linear(size, config.ffn_dim), nn.Linear(config.ffn_dim, size)
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=NORM_EPS)
        self.encoder_attn_layer_norm = nn.LayerNorm(size, eps=NORM_EPS)
        self.final_layer_norm = nn.LayerNorm(size, eps=NORM_EPS)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        memory: torch.Tensor,
        anchors: torch.Tensor,
        grid_size: torch.Tensor,
    ) -> torch.Tensor:
        """x and positions [n * Q, C]; the rest as DeformableAttention takes it -> [n * Q, C]."""
        x = self.self_attn_layer_norm(x + self.self_attn(x + positions, x, memory.shape[0]))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x + positions, memory, anchors, grid_size))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class Adt(nn.Module):
    """The whole transformation; every layer sees the map as it was before pooling.

    Reference points are read as stored: component 0 counts along the width, though the authors fill it with rows. They
    are trained as such, and swapping them would move every sample.
    """

    def __init__(self, size: int, queries: int, config: AdtConfig) -> None:
        super().__init__()
        self.reference_points = nn.Parameter(torch.empty(1, queries, 2))
        self.position_embeddings = nn.Parameter(torch.empty(1, queries, size))
        self.layers = nn.ModuleList(AdtLayer(size, config) for _ in range(config.num_layers))

    def forward(self, pooled: torch.Tensor, memory: torch.Tensor, grid_size: torch.Tensor) -> torch.Tensor:
        """Refine pooled queries.

        Args:
            pooled: [n, Q, C].
            memory: [n, S, C], maps in row-major order; rows behind width * height are padding and never read.
            grid_size: [n, 2] float32, (width, height).

        Returns:
            [n, Q, C].
        """
        images, queries, channels = pooled.shape
        # a location R + offset / (W, H) in units of the map is R * (W, H) + offset - 0.5 in pixels
        anchors = (self.reference_points * grid_size.unsqueeze(1) - 0.5).view(images, queries, 1, 1, 2)
        positions = self.position_embeddings.expand(images, -1, -1).reshape(images * queries, channels)
        x = pooled.reshape(images * queries, channels)
        for layer in self.layers:
            x = layer(x, positions, memory, anchors, grid_size)
        return x.view(images, queries, channels)
