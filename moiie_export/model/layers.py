"""Layers of the decoder: rotary positions, attention on static buffers, gated feed-forward (spec moiie.md, 1.4 and 1.10).

Shape legend: B rows, T tokens a row, N = B * T tokens in all, H hidden, I intermediate, Hq / Hkv heads, D head size.
Hidden states are [N, H] everywhere but inside attention, so that every linear layer is one matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.model_config import TextConfig
from moiie_export.ops.cached_attention import cached_attention

KeyValue = tuple[torch.Tensor, torch.Tensor]


class Adapter(NamedTuple):
    """Adapters of one layer, one a row or a single one for all rows (A = B or 1): down [A, b, H], up [A, H, b], biases."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    scale: torch.Tensor


class RMSNorm(nn.Module):
    """x / rms(x) in float32, then times weight; the result has the weight's precision, whatever that of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., H] -> [..., H]
        """Normalised x."""
        if x.dtype != self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float, table: str = "float32") -> KeyValue:
    """Cosines and sines [B, T, D/2] of the rotary embedding at `positions` [B, T], in float32.

    With table "bfloat16" the values are rounded to it, as in models whose tables were made in that precision.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponents)
    if table == "bfloat16":
        return angles.cos().to(torch.bfloat16).float(), angles.sin().to(torch.bfloat16).float()
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal self-attention with grouped keys; projections fused in rows [q | k | v]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.window = config.visible_keys or 0

    def forward(
        self, x: torch.Tensor, angles: KeyValue, past: KeyValue, positions: torch.Tensor
    ) -> tuple[torch.Tensor, KeyValue]:
        """x [N, H], positions [B, T] -> attention output [N, H], updated key and value buffers [B, Hkv, S, D]."""
        batch, tokens = positions.shape
        qkv = self.qkv_proj(x).view(batch, tokens, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        if qkv.dtype != angles[0].dtype:
            angles = (angles[0].to(qkv.dtype), angles[1].to(qkv.dtype))
        # slices, not split(): the exporter turns split into sequence ops, which few runtimes take
        query = torch.onnx.ops.rotary_embedding(qkv[:, : self.heads], *angles)
        key = torch.onnx.ops.rotary_embedding(qkv[:, self.heads : self.heads + self.kv_heads], *angles)
        value = qkv[:, self.heads + self.kv_heads :]
        out, keys, values = cached_attention(query, key, value, *past, positions, self.kv_heads, self.window)
        return self.o_proj(out.transpose(1, 2).reshape(batch * tokens, -1)), (keys, values)


class GatedMlp(nn.Module):
    """SwiGLU feed-forward; gate and up projections fused in rows [gate | up]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, H] -> [N, H]
        """down(silu(gate) * up)."""
        gate_up = self.gate_up_proj(x)
        gate, up = gate_up[:, : self.down_proj.in_features], gate_up[:, self.down_proj.in_features :]
        return self.down_proj(F.silu(gate) * up)
