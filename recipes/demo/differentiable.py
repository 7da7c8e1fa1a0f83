"""The decoder with gradients: plain torch versions of the four custom ops, and a forward whose rows share a prefix.

The exported ops have no autograd formula because inference needs none. These do the same arithmetic on the same
modules, and tests/recipes/test_demo_differentiable.py holds them equal to the ops.

Shapes: P positions of the shared prefix, B rows of L positions each, N = P + B * L tokens in all, H hidden, E experts,
k experts a token. Tokens are flat [N, H], prefix first, so that every matrix product is one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.model.layers import Attention, GatedMlp, RMSNorm, rotary_angles
from moiie_export.model.moe import MoeBlock
from moiie_export.model.vlm import VlmModel

Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """What all rows of a batch share.

    Attributes:
        prefix: [P] ids in front of every row, computed once.
        image_tokens: how many positions at the beginning of a row its picture takes.
        token_modality: [L] int32 of a row, 1 = vision; the prefix is language.
        positions: [L] int64 rotary positions of a row; the prefix has 0 to P - 1.
        mask: [L, L] bool, true where a query (row) sees a key (column) of its own row. All see the prefix.
    """

    prefix: torch.Tensor
    image_tokens: int
    token_modality: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


@dataclass
class Forward:
    """What went in and the residual stream behind the last layer [N, H]; of each layer with experts the logits [N, E]."""

    embeds: torch.Tensor
    hidden: torch.Tensor
    idle_work: torch.Tensor
    """How much is done to image tokens elsewhere than in vision experts: the mean square that dense layers at even
    indices and shared experts add to them, summed over layers."""
    language_work: torch.Tensor
    """The mean square that experts which text may reach would add to image tokens if all were sent to each of them."""
    router_logits: list[torch.Tensor]


def forward(model: VlmModel, embeds: torch.Tensor, rows: int, layout: Layout, depth: int | None = None) -> Forward:
    """The decoder over whole sequences, without a cache; embeds [N, H]. `depth`: how many layers, None for all."""
    decoder, shared = model.decoder, len(layout.prefix)
    positions = torch.cat((torch.arange(shared), layout.positions))
    cos, sin = rotary_angles(positions.unsqueeze(0), decoder.head_dim, decoder.rope_theta)
    angles = (cos.to(embeds.dtype), sin.to(embeds.dtype))
    mask = torch.cat((torch.ones(len(layout.positions), shared, dtype=torch.bool), layout.mask), dim=1)
    modality = torch.cat((torch.zeros(shared, dtype=torch.int32), layout.token_modality.repeat(rows)))
    x, routers = embeds, []
    idle, language = embeds.new_zeros((), dtype=torch.float32), embeds.new_zeros((), dtype=torch.float32)
    vision = modality == 1
    for index, layer in enumerate(decoder.layers[:depth]):
        x = x + attention(layer.self_attn, rms_norm(layer.input_layernorm, x), angles, mask, shared)
        normed = rms_norm(layer.post_attention_layernorm, x)
        if isinstance(layer.mlp, MoeBlock):
            out, logits, shared_work = moe(layer.mlp, normed, modality)
            routers.append(logits)
            idle, language = idle + shared_work, language + language_work(layer.mlp, normed[vision].detach())
        else:
            out = gated_mlp(layer.mlp, normed)
            if index % 2 == 0 and vision.any():
                idle = idle + out[vision].float().square().mean()
        x = x + out
    return Forward(embeds, x, idle, language, routers)


def rms_norm(module: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """x over its root mean square, times weight; the mean in float32."""
    scale = (x.float().square().mean(dim=-1, keepdim=True) + module.eps).rsqrt()
    return x * scale.to(x.dtype) * module.weight


def attention(module: Attention, x: torch.Tensor, angles: Angles, mask: torch.Tensor, shared: int) -> torch.Tensor:
    """x [N, H] -> attention output [N, H]; what CachedAttention gives for an empty cache and this mask [L, P + L]."""
    heads, kv_heads, dim = module.heads, module.kv_heads, module.head_dim
    length = len(mask)
    qkv = module.qkv_proj(x).view(-1, heads + 2 * kv_heads, dim)
    cos, sin = angles

    def split(part: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = part.transpose(1, 2)
        rotated = rotate(part[:, : heads + kv_heads], cos[:, start:stop], sin[:, start:stop])
        return rotated[:, :heads], rotated[:, heads:], part[:, heads + kv_heads :]

    query, key, value = split(qkv[:shared].unsqueeze(0), 0, shared)
    causal = torch.ones(shared, shared, dtype=torch.bool).tril()
    first = attend(query, key, value, causal)
    rest = qkv[shared:].view(-1, length, heads + 2 * kv_heads, dim)
    own_query, own_key, own_value = split(rest, shared, shared + length)
    keys = torch.cat((key.expand(len(rest), -1, -1, -1), own_key), dim=2)
    values = torch.cat((value.expand(len(rest), -1, -1, -1), own_value), dim=2)
    out = attend(own_query, keys, values, mask)
    flat = torch.cat([part.transpose(1, 2).reshape(-1, heads * dim) for part in (first, out)])
    return module.o_proj(flat)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of query [B, heads, L, D] to key and value [B, kv_heads, S, D] under mask [L, S].

    Written out because the backward pass of torch's fused attention takes most of a step on a CPU in bfloat16.
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = (query * dim**-0.5).reshape(batch, kv_heads, -1, dim)
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, -1) + bias
    shares = scores.softmax(dim=-1).view(batch, kv_heads, -1, key.shape[2])
    return (shares @ value).view(batch, heads, length, dim)


def gated_mlp(module: GatedMlp, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate) * up)."""
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    return module.down_proj(F.silu(gate) * up)


def moe(
    block: MoeBlock, x: torch.Tensor, token_modality: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block's output [N, H] for x [N, H], router logits [N, E], and the mean square of shared experts' work.

    The logits are -inf where a modality may not go; the work is what experts of both modalities add to image tokens.
    """
    groups = (block.moe.expert_groups["language"], block.moe.expert_groups["vision"])
    gates = (block.gate.weight, block.gate_vis.weight)
    logits = modality_router(x, gates, token_modality, groups, block.moe.num_experts)
    ids, weights = topk_route(logits, block.moe.top_k)
    vision = token_modality == 1
    work = torch.zeros((), dtype=torch.float32)
    out = torch.zeros_like(x)
    for expert in block.moe.reachable:
        routed = expert_dispatch(x, ids, weights, {expert: _bank(block, expert)})
        out = out + routed
        if expert in groups[0] and expert in groups[1] and vision.any():
            work = work + routed[vision].float().square().mean()
    return out, logits, work


def language_work(block: MoeBlock, images: torch.Tensor) -> torch.Tensor:
    """The mean square that each expert which text may reach makes of image tokens [n, H], summed over experts."""
    work = torch.zeros((), dtype=torch.float32)
    for expert in block.moe.expert_groups["language"] if len(images) else ():
        work = work + expert_mlp(images, *_bank(block, expert)).float().square().mean()
    return work


def _bank(block: MoeBlock, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    module = block.experts[str(expert)]
    return module.gate_up_proj, module.down_proj


def modality_router(
    hidden: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor],
    token_modality: torch.Tensor,
    groups: tuple[tuple[int, ...], tuple[int, ...]],
    num_experts: int,
) -> torch.Tensor:
    """Router logits [N, E] in float32; `gates` and `groups` are (language, vision)."""
    both = []
    for gate, experts in zip(gates, groups, strict=True):
        logits = hidden.float() @ gate.float().T
        spread = logits.new_full((hidden.shape[0], num_experts), -torch.inf)
        both.append(spread.index_copy(1, torch.tensor(experts), logits))
    return torch.where((token_modality == 1).unsqueeze(1), both[1], both[0])


def topk_route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_ids [N, k] and expert_weights [N, k], the weights summing to 1."""
    weights, ids = logits.softmax(dim=-1).topk(top_k, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True)


def expert_dispatch(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: dict[int, tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Weighted sum [N, H] over the chosen experts; `experts`: id -> (gate_up_proj, down_proj)."""
    out = torch.zeros_like(hidden)
    for expert, bank in experts.items():
        rows, slots = torch.where(expert_ids == expert)
        routed = expert_mlp(hidden[rows], *bank) * expert_weights[rows, slots].unsqueeze(1).to(hidden.dtype)
        out = out.index_add(0, rows, routed)
    return out


def expert_mlp(x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> torch.Tensor:
    """down(silu(gate) * up) of x [n, H] with weights [2I, H] and [H, I]."""
    gate, up = F.linear(x, gate_up_proj).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down_proj)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, heads, L, D] by angles [1, L, D/2], halves rotated against each other."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
