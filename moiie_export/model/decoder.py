"""The language decoder on static key-value buffers, in the two forms that are exported: prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moiie_export.model.layers import Adapter, Attention, GatedMlp, KeyValue, RMSNorm, rotary_angles
from moiie_export.model.moe import MoeBlock, Routing
from moiie_export.model_config import ModelConfig
from moiie_export.ops.adapter_dispatch import adapter_dispatch


@dataclass
class DecoderOutput:
    """Of one call.

    Attributes:
        logits: [B, kept, V].
        hidden: per layer the residual stream [N, H] behind it.
        present: per layer the updated buffers.
        routing: per layer what its expert block decided; None where the layer is dense.
        adapted: what each layer's adapter added [B, T, H], for the layers that were given one.
    """

    logits: torch.Tensor
    hidden: list[torch.Tensor]
    present: list[KeyValue]
    routing: list[Routing | None]
    adapted: list[torch.Tensor] = field(default_factory=list)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        text = config.text
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.self_attn = Attention(text)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        sparse = config.moe is not None and index in config.moe.layers
        self.mlp: nn.Module = MoeBlock(text, config.moe) if sparse and config.moe else GatedMlp(text)

    def forward(
        self,
        x: torch.Tensor,
        token_modality: torch.Tensor | None,
        angles: KeyValue,
        past: KeyValue,
        positions: torch.Tensor,
        adapter: Adapter | None = None,
    ) -> tuple[torch.Tensor, KeyValue, Routing | None, torch.Tensor | None]:
        """x [N, H] -> residual stream [N, H], updated buffers, routing, what the adapter added [B, T, H]."""
        attended, present = self.self_attn(self.input_layernorm(x), angles, past, positions)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        routing, added = None, None
        if isinstance(self.mlp, MoeBlock):
            out, routing = self.mlp(normed, token_modality)
        else:
            out = self.mlp(normed)
        if adapter is not None:
            rows = normed.view(*positions.shape, -1)
            rows = rows if rows.dtype == adapter.down.dtype else rows.to(adapter.down.dtype)
            added = adapter_dispatch(rows, *adapter)
            out = out + added.view(normed.shape)
        return x + out, present, routing, added


class Decoder(nn.Module):
    """The stack of layers, the final norm and the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.head_dim, self.rope_theta, self.rotary_table = text.head_dim, text.rope_theta, text.rotary_table

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        token_modality: torch.Tensor | None,
        past_lengths: torch.Tensor,
        logits_to_keep: torch.Tensor | None,
        past_key_values: list[KeyValue],
        adapters: Sequence[Adapter | None] | None = None,
    ) -> DecoderOutput:
        """One call over T new tokens a row.

        The residual stream has the widest precision among inputs_embeds, weights and adapters: with weights in half
        precision, float32 embeddings or adapters keep it in float32 (spec mome.md, 3).

        Args:
            inputs_embeds: [B, T, H] embeddings, image features already in their places.
            token_modality: [B, T] int32, 1 = vision after the last-image-token rule; None: every token is language.
            past_lengths: [B] int64, keys already in the buffers.
            logits_to_keep: [B, kept] int64 positions whose logits are wanted; None: all.
            past_key_values: per layer key and value buffers [B, Hkv, S, D].
            adapters: per layer the chosen adapters, None where it has none (spec mome.md, 1.3); None: no layer has one.
        """
        batch, tokens, width = inputs_embeds.shape
        positions = past_lengths.unsqueeze(1) + torch.arange(tokens, device=past_lengths.device)
        angles = rotary_angles(positions, self.head_dim, self.rope_theta, self.rotary_table)
        modality = None if token_modality is None else token_modality.reshape(batch * tokens)
        x = inputs_embeds.reshape(batch * tokens, width)
        hidden, present, routings, adapted = [], [], [], []
        given = [None] * len(self.layers) if adapters is None else adapters
        for layer, past, adapter in zip(self.layers, past_key_values, given, strict=True):
            x, buffers, routing, added = layer(x, modality, angles, past, positions, adapter)
            hidden.append(x)
            present.append(buffers)
            routings.append(routing)
            adapted += [] if added is None else [added]
        if logits_to_keep is not None:
            first = torch.arange(batch, device=x.device).unsqueeze(1) * tokens
            x = x.index_select(0, (first + logits_to_keep).reshape(-1))
        logits = self.lm_head(self.norm(x)).reshape(batch, -1, self.lm_head.out_features)
        return DecoderOutput(logits, hidden, present, routings, adapted)
