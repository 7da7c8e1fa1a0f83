"""The adapters of all layers: banks on the host, of which a request takes one a layer (spec mome.md, 1.3 and 6.3)."""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.model.layers import Adapter
from moiie_export.model.mome.router import StackedLinear
from moiie_export.mome_config import MomeConfig


class AdapterBank(nn.Module):
    """K adapters of one layer, stacked; no graph holds them."""

    def __init__(self, experts: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.down_proj = StackedLinear(experts, hidden, bottleneck)
        self.up_proj = StackedLinear(experts, bottleneck, hidden)
        self.scale = nn.Parameter(torch.empty(experts))

    def choose(self, index: torch.Tensor) -> Adapter:
        """The adapters of requests, index [b] -> one a row; a single request's serves all rows (its beams)."""
        down, up = self.down_proj, self.up_proj
        return Adapter(down.weight[index], down.bias[index], up.weight[index], up.bias[index], self.scale[index])


class Mole(nn.ModuleDict):
    """Decoder layer (as text) -> its bank."""

    def __init__(self, config: MomeConfig) -> None:
        sizes = (config.mole.num_experts, config.text.hidden_size, config.mole.bottleneck)
        super().__init__({str(layer): AdapterBank(*sizes) for layer in config.mole.layers})
        self.decoder_layers = config.text.num_hidden_layers

    def choose(self, mole_index: torch.Tensor) -> list[Adapter | None]:
        """mole_index [b, L] of the router -> for every decoder layer its adapters, None where it has none."""
        chosen: list[Adapter | None] = [None] * self.decoder_layers
        for column, (layer, bank) in enumerate(self.items()):
            assert isinstance(bank, AdapterBank)
            chosen[int(layer)] = bank.choose(mole_index[:, column].long())
        return chosen
