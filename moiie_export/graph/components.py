"""The graphs of a bundle: what is traced, with which names, shapes and example inputs.

Dimension legend: batch B, sequence T, kept K, images n; strings are dynamic, integers are fixed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moiie_export.model.decoder import Decoder, DecoderOutput
from moiie_export.model.layers import KeyValue
from moiie_export.model.vlm import VisionEncoder, VlmModel
from moiie_export.model_config import ModelConfig

Dims = tuple[int | str, ...]

_EXAMPLE = {"images": 2, "batch": 2, "sequence": 6, "kept": 3}
"""Sizes used while tracing; all above 1, because torch specialises on 0 and 1."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: torch.dtype
    dims: Dims


@dataclass(frozen=True)
class Component:
    """One graph.

    Attributes:
        name: its name in the bundle; its file is onnx/<name>.onnx.
        module: makes the traced module from the model (on the meta device).
        inputs: in the order of the module's flattened arguments.
        outputs: names in the order of the module's flattened results.
        probes: outputs that exist only while tracing, so that parity can find their values by name.
        arrange: turns the flat list of inputs into the module's arguments.
    """

    name: str
    module: Callable[[VlmModel], nn.Module]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    probes: tuple[Tensor, ...]
    arrange: Callable[[list[Any]], tuple[Any, ...]]

    @property
    def file(self) -> str:
        """Path inside the bundle."""
        return f"onnx/{self.name}.onnx"

    def example(self, tensor: Tensor) -> torch.Tensor:
        """A tensor without data, for tracing."""
        shape = [_EXAMPLE[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")


class _Vision(nn.Module):
    def __init__(self, model: VlmModel) -> None:
        super().__init__()
        self.vision_encoder: VisionEncoder = model.vision_encoder

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vision_encoder(pixel_values)


class _Prefill(nn.Module):
    def __init__(self, model: VlmModel) -> None:
        super().__init__()
        self.decoder: Decoder = model.decoder

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        token_modality: torch.Tensor,
        past_lengths: torch.Tensor,
        logits_to_keep: torch.Tensor,
        past: list[KeyValue],
    ) -> tuple[torch.Tensor, ...]:
        return _flatten(self.decoder(inputs_embeds, token_modality, past_lengths, logits_to_keep, past))


class _Decode(nn.Module):
    def __init__(self, model: VlmModel) -> None:
        super().__init__()
        self.decoder: Decoder = model.decoder

    def forward(
        self, inputs_embeds: torch.Tensor, past_lengths: torch.Tensor, past: list[KeyValue]
    ) -> tuple[torch.Tensor, ...]:
        return _flatten(self.decoder(inputs_embeds, None, past_lengths, None, past))


def _flatten(output: DecoderOutput) -> tuple[torch.Tensor, ...]:
    """In the order of `_decoder_outputs`, then the probes."""
    flat = [output.logits]
    for buffers in output.present:
        flat += buffers
    for routing in output.routing:
        if routing is not None:
            flat += [routing.expert_ids, routing.expert_weights]
            flat += [] if routing.router_logits is None else [routing.router_logits]
    return (*flat, *output.hidden)


def components(config: ModelConfig, capacity: int) -> tuple[Component, ...]:
    """The three graphs of a MoIIE bundle.

    Args:
        config: the model.
        capacity: tokens the key-value buffers hold; fixed in the graphs.
    """
    return (_vision(config), _prefill(config, capacity), _decode(config, capacity))


def _vision(config: ModelConfig) -> Component:
    side, tokens = config.vision.input_size, config.vision.image_tokens
    return Component(
        "vision_encoder",
        _Vision,
        (Tensor("pixel_values", torch.float32, ("images", 3, side, side)),),
        (Tensor("image_features", torch.float32, ("images", tokens, config.text.hidden_size)),),
        (Tensor("vision_features", torch.float32, ("images", tokens, config.vision.feature_size)),),
        tuple,
    )


def _prefill(config: ModelConfig, capacity: int) -> Component:
    inputs = (
        Tensor("inputs_embeds", torch.float32, ("batch", "sequence", config.text.hidden_size)),
        Tensor("token_modality", torch.int32, ("batch", "sequence")),
        Tensor("past_lengths", torch.int64, ("batch",)),
        Tensor("logits_to_keep", torch.int64, ("batch", "kept")),
        *_buffers(config, capacity, "past_key_values"),
    )
    tokens = "batch*sequence"
    outputs, probes = _decoder_outputs(config, capacity, "kept", tokens)
    return Component("decoder_prefill", _Prefill, inputs, outputs, probes, lambda flat: (*flat[:4], _pairs(flat[4:])))


def _decode(config: ModelConfig, capacity: int) -> Component:
    inputs = (
        Tensor("inputs_embeds", torch.float32, ("batch", 1, config.text.hidden_size)),
        Tensor("past_lengths", torch.int64, ("batch",)),
        *_buffers(config, capacity, "past_key_values"),
    )
    outputs, probes = _decoder_outputs(config, capacity, 1, "batch")
    return Component("decoder_decode", _Decode, inputs, outputs, probes, lambda flat: (*flat[:2], _pairs(flat[2:])))


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _buffers(config: ModelConfig, capacity: int, prefix: str) -> tuple[Tensor, ...]:
    text = config.text
    dims: Dims = ("batch", text.num_key_value_heads, capacity, text.head_dim)
    return tuple(
        Tensor(f"{prefix}.{layer}.{kind}", torch.float32, dims)
        for layer in range(text.num_hidden_layers)
        for kind in ("key", "value")
    )


def _decoder_outputs(
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
