"""MoME with gradients: plain torch versions of its custom ops, and a forward over whole rows without a cache.

The exported ops have no autograd formula because inference needs none. These do the same arithmetic on the same
modules, and tests/recipes/test_demo_mome_differentiable.py holds them equal to the ops.

Shapes: B rows of L positions, H hidden, Q queries, K adapters a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.model.layers import Attention, rotary_angles
from moiie_export.model.mome.adt import Adt, DeformableAttention
from moiie_export.model.mome.model import MomeModel
from moiie_export.model.mome.mole import AdapterBank
from moiie_export.model.mome.pooling import pool
from moiie_recipes.demo.differentiable import Angles, attend, gated_mlp, rms_norm, rotate


@dataclass(frozen=True)
class Layout:
    """What all rows of a batch share.

    Attributes:
        prefix: ids before the picture.
        image_tokens: positions of the picture.
        suffix: ids behind the picture.
        positions: [L] int64 rotary positions.
        mask: [L, L] bool, true where a query (row) sees a key (column).
    """

    prefix: torch.Tensor
    image_tokens: int
    suffix: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    @property
    def shared(self) -> int:
        """Positions in front of the questions."""
        return len(self.prefix) + self.image_tokens + len(self.suffix)


def vision_features(model: MomeModel, towers: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """image_features of each expert, [B, Q (+ 1), H], from what its tower gives [B, P, C]."""
    found = []
    for expert in model.config.experts:
        module, features = model.get_submodule(expert.component), towers[expert.name]
        if expert.adt is None:
            found.append(module.projector(module.norm(features)))
            continue
        side = round(features.shape[1] ** 0.5)  # pictures of this set are square, and so are their grids
        size = torch.full((len(features), 2), float(side))
        pooled = pool(features, (side, side), model.config.query_grid)
        found.append(module.projector(adt(module.adt, pooled, features, size)))
    return found


def adt(module: Adt, pooled: torch.Tensor, memory: torch.Tensor, grid_size: torch.Tensor) -> torch.Tensor:
    """What `module` gives for pooled [n, Q, C], memory [n, S, C] and grid_size [n, 2]."""
    images, queries, channels = pooled.shape
    anchors = (module.reference_points * grid_size.unsqueeze(1) - 0.5).view(images, queries, 1, 1, 2)
    positions = module.position_embeddings.expand(images, -1, -1).reshape(images * queries, channels)
    x = pooled.reshape(images * queries, channels)
    for layer in module.layers:
        x = layer.self_attn_layer_norm(x + layer.self_attn(x + positions, x, images))
        sampled = deformable_attention(layer.encoder_attn, x + positions, memory, anchors, grid_size)
        x = layer.encoder_attn_layer_norm(x + sampled)
        x = layer.final_layer_norm(x + layer.fc2(F.relu(layer.fc1(x))))
    return x.view(images, queries, channels)


def deformable_attention(
    module: DeformableAttention,
    placed: torch.Tensor,
    memory: torch.Tensor,
    anchors: torch.Tensor,
    grid_size: torch.Tensor,
) -> torch.Tensor:
    """What `module` gives, [n * Q, C]."""
    images, rows, channels = memory.shape
    shape = (images, -1, module.heads, module.points)
    points = anchors + module.sampling_offsets(placed).view(*shape, 2)
    weights = module.attention_weights(placed).view(*shape).softmax(dim=-1)
    value = module.value_proj(memory).view(images, rows, module.heads, -1)
    return module.output_proj(deformable_sample(value, points, weights, grid_size).reshape(-1, channels))


def deformable_sample(
    value: torch.Tensor, points: torch.Tensor, weights: torch.Tensor, grid_size: torch.Tensor
) -> torch.Tensor:
    """Weighted bilinear samples [n, Q, h * D]; see moiie_export/ops/deformable_sample.py for the shapes."""
    images, queries, heads, count, _ = points.shape
    size = grid_size.view(images, 1, 1, 1, 2)
    low = points.detach().floor()
    per_head = value.transpose(1, 2)
    corners = []
    for dx, dy in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        corner = low + low.new_tensor([dx, dy])
        inside = ((corner >= 0) & (corner < size)).all(dim=-1)
        x, y = corner.where(inside.unsqueeze(-1), 0.0).long().unbind(dim=-1)
        index = (y * size[..., 0].long() + x).permute(0, 2, 1, 3).reshape(images, heads, queries * count, 1)
        rows = per_head.gather(2, index.expand(-1, -1, -1, value.shape[3])).unflatten(2, (queries, count))
        share = ((1 - (points - corner).abs()).prod(dim=-1) * weights).where(inside, 0.0).permute(0, 2, 1, 3)
        corners.append((rows * share.unsqueeze(-1)).sum(dim=3))
    return torch.stack(corners).sum(dim=0).transpose(1, 2).flatten(2)


def straight_through(logits: torch.Tensor) -> torch.Tensor:
    """One-hot of the largest along the last dimension, with the gradient of the softmax (spec mome.md, 1.3)."""
    shares = logits.softmax(dim=-1)
    chosen = F.one_hot(shares.argmax(dim=-1), shares.shape[-1]).to(shares.dtype)
    return chosen + shares - shares.detach()


def adapters(bank: AdapterBank, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The sum of a layer's adapters [B, L, H], each times its share [B, K]: with one-hot shares, the chosen one."""
    down, up = bank.down_proj, bank.up_proj
    gains = shares.to(x.dtype) * bank.scale
    inner = F.relu(F.linear(x, down.weight.flatten(0, 1), down.bias.flatten()))
    weighed = inner.unflatten(2, (len(bank.scale), -1)) * gains[:, None, :, None]
    return F.linear(weighed.flatten(2), up.weight.transpose(0, 1).flatten(1)) + (gains @ up.bias).unsqueeze(1)


def decode(model: MomeModel, embeds: torch.Tensor, layout: Layout, shares: torch.Tensor | None = None) -> torch.Tensor:
    """The residual stream [B, L, H] behind the last layer for embeds [B, L, H].

    `shares` [B, layers, K] of the adapters; None leaves them all out.
    """
    decoder = model.decoder
    cos, sin = rotary_angles(layout.positions.unsqueeze(0), decoder.head_dim, decoder.rope_theta)
    angles = (cos.to(embeds.dtype), sin.to(embeds.dtype))
    x = embeds
    for index, layer in enumerate(decoder.layers):
        x = x + attention(layer.self_attn, rms_norm(layer.input_layernorm, x), angles, layout.mask)
        normed = rms_norm(layer.post_attention_layernorm, x)
        out = gated_mlp(layer.mlp, normed)
        if shares is not None:
            out = out + adapters(model.mole[str(index)], normed, shares[:, index])
        x = x + out
    return x


def attention(module: Attention, x: torch.Tensor, angles: Angles, mask: torch.Tensor) -> torch.Tensor:
    """x [B, L, H] -> attention output [B, L, H]; what CachedAttention gives for an empty cache and this mask."""
    heads, kv_heads = module.heads, module.kv_heads
    qkv = module.qkv_proj(x).unflatten(2, (heads + 2 * kv_heads, module.head_dim)).transpose(1, 2)
    rotated = rotate(qkv[:, : heads + kv_heads], *angles)
    out = attend(rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :], mask)
    return module.o_proj(out.transpose(1, 2).flatten(2))
