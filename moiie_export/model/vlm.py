"""The whole model: vision encoder (tower and projector), embedding table, decoder."""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.model.decoder import Decoder
from moiie_export.model.siglip import SiglipTower
from moiie_export.model_config import MoiieConfig


class VisionEncoder(nn.Module):
    """Pictures to rows of the decoder's input (spec moiie.md, 1.1 to 1.3)."""

    def __init__(self, config: MoiieConfig) -> None:
        super().__init__()
        self.tower = SiglipTower(config.vision)
        width = config.text.hidden_size
        modules: list[nn.Module] = []
        for index in range(config.projector_layers):
            modules += [nn.GELU()] if index else []
            modules.append(nn.Linear(config.vision.feature_size if index == 0 else width, width))
        self.projector = nn.Sequential(*modules)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixel_values [n, 3, S, S] -> image_features [n, P, H], and the tower's own features [n, P, C]."""
        features = self.tower(pixel_values)
        images, patches, channels = features.shape
        projected = self.projector(features.reshape(images * patches, channels))
        return projected.view(images, patches, -1), features


class VlmModel(nn.Module):
    """MoIIE and its siblings; parameter names are the bundle's tensor names."""

    def __init__(self, config: MoiieConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config)
        self.embed_tokens = nn.Embedding(config.text.vocab_size, config.text.hidden_size)
        self.decoder = Decoder(config)

    def new_cache(self, batch: int, capacity: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Empty key and value buffers [B, Hkv, capacity, D] for every layer."""
        text = self.config.text
        shape = (batch, text.num_key_value_heads, capacity, text.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(text.num_hidden_layers)]
