"""The instance router: one sentence decides the vision experts' weights and every layer's adapter (spec mome.md, 1.2, 1.3).

Shape legend: b sentences, e width of their embedding, E vision experts, L layers with adapters, K adapters a layer.
Everything is float32: in half precision the logits of two adapters collapse to a tie and the choice flips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.model.mome.sentence import SentenceEncoder
from moiie_export.model.mome.transformer import Mlp
from moiie_export.mome_config import MomeConfig


@dataclass
class InstanceRouting:
    """What a sentence decides.

    Attributes:
        move_weights: [b, E], softmax over the vision experts in the config's order.
        mole_index: [b, L] int32, the adapter of each layer that has some; of equal logits the first.
        sentence_embedding: [b, e].
        move_logits: [b, E].
        mole_logits: [b, L, K].
    """

    move_weights: torch.Tensor
    mole_index: torch.Tensor
    sentence_embedding: torch.Tensor
    move_logits: torch.Tensor
    mole_logits: torch.Tensor


class StackedLinear(nn.Module):
    """One linear layer per decoder layer: weight [L, out, in], bias [L, out]."""

    def __init__(self, layers: int, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, size_out, size_in))
        self.bias = nn.Parameter(torch.empty(layers, size_out))

    def forward(self, columns: torch.Tensor) -> torch.Tensor:  # [in, b] or [L, in, b] -> [L, out, b]
        """Weights stand on the left, so that none is transposed."""
        return self.weight @ columns + self.bias.unsqueeze(-1)


class MoleRouters(nn.Module):
    """The routers of all layers at once."""

    def __init__(self, size: int, hidden: int, layers: int, experts: int) -> None:
        super().__init__()
        self.fc1 = StackedLinear(layers, size, hidden)
        self.fc2 = StackedLinear(layers, hidden, experts)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:  # [b, e] -> [b, L, K]
        """Logits of the adapters."""
        logits = self.fc2(F.gelu(self.fc1(embedding.transpose(0, 1))))
        return logits.permute(2, 0, 1)


class Router(nn.Module):
    """From token ids to decisions, once a request."""

    def __init__(self, config: MomeConfig) -> None:
        super().__init__()
        size, mole = config.sentence.hidden_size, config.mole
        self.sentence_encoder = SentenceEncoder(config.sentence)
        self.move = Mlp(size, config.move_router_hidden, len(config.experts))
        self.mole = MoleRouters(size, mole.router_hidden, len(mole.layers), mole.num_experts)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> InstanceRouting:
        """input_ids and attention_mask [b, t] int64, of the sentence encoder's own tokenizer."""
        return self.decide(self.sentence_encoder(input_ids, attention_mask))

    def decide(self, embedding: torch.Tensor) -> InstanceRouting:
        """The same from sentence embeddings [b, e]."""
        move, mole = self.move(embedding), self.mole(embedding)
        index = mole.argmax(dim=-1).to(torch.int32)
        return InstanceRouting(move.softmax(dim=-1), index, embedding, move, mole)
