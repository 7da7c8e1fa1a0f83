"""The graphs of a MoIIE bundle: one vision encoder, and the decoder."""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.graph.components import Component, Tensor
from moiie_export.graph.decoder_components import decoder_components
from moiie_export.model.vlm import VisionEncoder, VlmModel
from moiie_export.model_config import MoiieConfig


class _Vision(nn.Module):
    def __init__(self, model: VlmModel) -> None:
        super().__init__()
        self.vision_encoder: VisionEncoder = model.vision_encoder

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vision_encoder(pixel_values)


def components(config: MoiieConfig, capacity: int) -> tuple[Component, ...]:
    """The three graphs; `capacity`: tokens the key-value buffers hold, fixed in the graphs."""
    return (_vision(config), *decoder_components(config, capacity))


def _vision(config: MoiieConfig) -> Component:
    side, tokens = config.vision.input_size, config.image_tokens
    return Component(
        "vision_encoder",
        _Vision,
        (Tensor("pixel_values", torch.float32, ("images", 3, side, side)),),
        (Tensor("image_features", torch.float32, ("images", tokens, config.text.hidden_size)),),
        (Tensor("vision_features", torch.float32, ("images", tokens, config.vision.feature_size)),),
        tuple,
        layers="vision_encoder.tower.layers",
    )
