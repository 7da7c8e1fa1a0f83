"""The decoder's two graphs, prefill and decode, for every family.

Dimension legend: batch B, sequence T, kept K, adapters A (1: shared by all rows, or B).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moiie_export.graph.components import Component, Dims, Tensor
from moiie_export.model.decoder import Decoder, DecoderOutput
from moiie_export.model.layers import Adapter, KeyValue
from moiie_export.model_config import ModelConfig


@dataclass(frozen=True)
class AdapterLayers:
    """Adapters beside feed-forward networks: the layers that have them, and the width between their projections."""

    layers: tuple[int, ...]
    bottleneck: int

    def tensors(self, hidden: int) -> tuple[Tensor, ...]:
        """Inputs of a decoder graph: the adapters a request has chosen, in the order of `Adapter`'s fields."""
        shapes: dict[str, Dims] = {
            "down": (self.bottleneck, hidden),
            "down_bias": (self.bottleneck,),
            "up": (hidden, self.bottleneck),
            "up_bias": (hidden,),
            "scale": (),
        }
        return tuple(
            Tensor(f"adapter.{layer}.{leaf}", torch.float32, ("adapters", *shapes[leaf]))
            for layer in self.layers
            for leaf in Adapter._fields
        )

    def arrange(self, flat: list[Any], layers: int) -> list[Any] | None:
        """Those inputs by decoder layer, None where there is no adapter. Tracing takes plain tuples only."""
        if not self.layers:
            return None
        width = len(Adapter._fields)
        chosen: list[Any] = [None] * layers
        for index, layer in enumerate(self.layers):
            chosen[layer] = tuple(flat[index * width : (index + 1) * width])
        return chosen


NO_ADAPTERS = AdapterLayers((), 0)


_Chosen = list[tuple[torch.Tensor, ...] | None] | None


def _named(adapters: _Chosen) -> list[Adapter | None] | None:
    return None if adapters is None else [None if each is None else Adapter(*each) for each in adapters]


class _Prefill(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder: Decoder = model.decoder

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        token_modality: torch.Tensor,
        past_lengths: torch.Tensor,
        logits_to_keep: torch.Tensor,
        past: list[KeyValue],
        adapters: _Chosen,
    ) -> tuple[torch.Tensor, ...]:
        return _flatten(
            self.decoder(inputs_embeds, token_modality, past_lengths, logits_to_keep, past, _named(adapters))
        )


class _Decode(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder: Decoder = model.decoder

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        past_lengths: torch.Tensor,
        past: list[KeyValue],
        adapters: _Chosen,
    ) -> tuple[torch.Tensor, ...]:
        return _flatten(self.decoder(inputs_embeds, None, past_lengths, None, past, _named(adapters)))


def _flatten(output: DecoderOutput) -> tuple[torch.Tensor, ...]:
    """In the order of `_outputs`, then the probes."""
    flat = [output.logits]
    for buffers in output.present:
        flat += buffers
    for routing in output.routing:
        if routing is not None:
            flat += [routing.expert_ids, routing.expert_weights]
            flat += [] if routing.router_logits is None else [routing.router_logits]
    return (*flat, *output.hidden)


def decoder_components(
    config: ModelConfig, capacity: int, adapters: AdapterLayers = NO_ADAPTERS
) -> tuple[Component, Component]:
    """Prefill and decode; `capacity`: tokens the key-value buffers hold, fixed in the graphs."""
    hidden, layers = config.text.hidden_size, config.text.num_hidden_layers
    buffers, chosen = _buffers(config, capacity, "past_key_values"), adapters.tensors(hidden)

    def arrange(flat: list[Any], plain: int) -> tuple[Any, ...]:
        stop = plain + len(buffers)
        pairs = list(zip(flat[plain:stop:2], flat[plain + 1 : stop : 2], strict=True))
        return (*flat[:plain], pairs, adapters.arrange(flat[stop:], layers))

    prefill = (
        Tensor("inputs_embeds", torch.float32, ("batch", "sequence", hidden)),
        Tensor("token_modality", torch.int32, ("batch", "sequence")),
        Tensor("past_lengths", torch.int64, ("batch",)),
        Tensor("logits_to_keep", torch.int64, ("batch", "kept")),
    )
    decode = (
        Tensor("inputs_embeds", torch.float32, ("batch", 1, hidden)),
        Tensor("past_lengths", torch.int64, ("batch",)),
    )

    def of_depth(depth: int, which: int) -> Component:
        below = AdapterLayers(tuple(layer for layer in adapters.layers if layer < depth), adapters.bottleneck)
        return decoder_components(_of_depth(config, depth), capacity, below)[which]

    path = "decoder.layers"
    many, one = _outputs(config, capacity, "kept", "batch*sequence"), _outputs(config, capacity, 1, "batch")
    return (
        Component(
            "decoder_prefill",
            _Prefill,
            (*prefill, *buffers, *chosen),
            *many,
            lambda flat: arrange(flat, 4),
            path,
            lambda depth: of_depth(depth, 0),
        ),
        Component(
            "decoder_decode",
            _Decode,
            (*decode, *buffers, *chosen),
            *one,
            lambda flat: arrange(flat, 2),
            path,
            lambda depth: of_depth(depth, 1),
        ),
    )


def _of_depth(config: ModelConfig, depth: int) -> ModelConfig:
    """The same decoder with its first layers only."""
    text, moe = replace(config.text, num_hidden_layers=depth), config.moe
    if moe is not None:
        moe = replace(moe, layers=tuple(layer for layer in moe.layers if layer < depth))
    return replace(config, text=text, moe=moe)


def _buffers(config: ModelConfig, capacity: int, prefix: str) -> tuple[Tensor, ...]:
    text = config.text
    dims: Dims = ("batch", text.num_key_value_heads, capacity, text.head_dim)
    return tuple(
        Tensor(f"{prefix}.{layer}.{kind}", torch.float32, dims)
        for layer in range(text.num_hidden_layers)
        for kind in ("key", "value")
    )


def _outputs(
    config: ModelConfig, capacity: int, kept: int | str, tokens: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    text, moe = config.text, config.moe
    outputs = [
        Tensor("logits", torch.float32, ("batch", kept, text.vocab_size)),
        *_buffers(config, capacity, "present"),
    ]
    if moe is not None:
        for layer in moe.layers:
            outputs.append(Tensor(f"expert_ids.{layer}", torch.int32, (tokens, moe.top_k)))
            outputs.append(Tensor(f"expert_weights.{layer}", torch.float32, (tokens, moe.top_k)))
            if moe.gates:
                outputs.append(Tensor(f"router_logits.{layer}", torch.float32, (tokens, moe.num_experts)))
    probes = tuple(
        Tensor(f"hidden.{layer}", torch.float32, (tokens, text.hidden_size)) for layer in range(text.num_hidden_layers)
    )
    return tuple(outputs), probes
