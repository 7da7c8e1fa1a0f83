"""The whole MoME: vision experts, instance router, embedding table, decoder, adapters (spec mome.md, 0.1)."""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.model.decoder import Decoder
from moiie_export.model.mome.encoders import vision_expert
from moiie_export.model.mome.mole import Mole
from moiie_export.model.mome.router import Router
from moiie_export.mome_config import MomeConfig


class MomeModel(nn.Module):
    """MoME; parameter names are the bundle's tensor names, vision experts are `vision_<name>`."""

    def __init__(self, config: MomeConfig) -> None:
        super().__init__()
        self.config = config
        for expert in config.experts:
            self.add_module(expert.component, vision_expert(config, expert))
        self.router = Router(config)
        self.embed_tokens = nn.Embedding(config.text.vocab_size, config.text.hidden_size)
        self.decoder = Decoder(config)
        self.mole = Mole(config)

    def new_cache(self, batch: int, capacity: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Empty key and value buffers [B, Hkv, capacity, D] for every layer."""
        text = self.config.text
        shape = (batch, text.num_key_value_heads, capacity, text.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(text.num_hidden_layers)]
