"""What MoME's towers share: self-attention, and the pre-norm layer of EVA and DINOv2 (spec mome.md, 2).

Shape legend: n rows of P tokens (pictures or sentences), C channels. Hidden states are [n * P, C], so that every linear
layer is one matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn


class SelfAttention(nn.Module):
    """Full attention among the tokens of a row; projections fused in rows [q | k | v].

    Args:
        size: C.
        heads: attention heads.
        head_dim: width of one; C need not be heads * head_dim.
        bias: whether the projections have biases.
        scale: factor of the scores; None: 1/sqrt(head_dim).
    """

    def __init__(self, size: int, heads: int, head_dim: int, *, bias: bool = True, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, scale
        self.qkv = nn.Linear(size, 3 * heads * head_dim, bias=bias)
        self.output = nn.Linear(heads * head_dim, size, bias=bias)

    def forward(self, x: torch.Tensor, rows: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        """x [n * P, C], seen [n, 1, P, P] bool (None: everything) -> attention output [n * P, C]."""
        heads = self.heads
        qkv = self.qkv(x).view(rows, -1, 3 * heads, self.head_dim).transpose(1, 2)
        query, key, value = qkv[:, :heads], qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)
        return self.output(out.transpose(1, 2).reshape(-1, heads * self.head_dim))


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between; as wide behind as before unless `out` says otherwise."""

    def __init__(self, size: int, inner: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, inner), nn.Linear(inner, out or size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C] -> [N, out]
        """Feed-forward output."""
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm layer; with `scaled`, both branches are multiplied by a learned vector (DINOv2's LayerScale)."""

    def __init__(self, size: int, inner: int, heads: int, eps: float, *, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=eps), nn.LayerNorm(size, eps=eps)
        self.attention, self.mlp = SelfAttention(size, heads, size // heads), Mlp(size, inner)
        self.scaled = scaled
        if scaled:
            self.layer_scale1, self.layer_scale2 = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:  # [n * P, C] -> [n * P, C]
        """Residual stream behind the layer."""
        attended = self.attention(self.norm1(x), rows)
        x = x + (attended * self.layer_scale1 if self.scaled else attended)
        out = self.mlp(self.norm2(x))
        return x + (out * self.layer_scale2 if self.scaled else out)
