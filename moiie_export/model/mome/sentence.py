"""The sentence encoder: BERT, the mean of its real tokens, scaled to length 1 (spec mome.md, 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.model.mome.transformer import Mlp, SelfAttention
from moiie_export.mome_config import SentenceConfig


class BertEmbeddings(nn.Module):
    """Words, positions and the type of a first sentence, normed."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # [b, t] -> [b, t, C]
        """Normed embeddings."""
        # looked up, not sliced: a slice would bound the number of tokens in the traced graph
        places = self.position_embeddings(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.norm(self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0] + places)


class BertLayer(nn.Module):
    """Post-norm layer with an exact GELU."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.attention = SelfAttention(size, heads, size // heads)
        self.mlp = Mlp(size, config.intermediate_size)
        self.norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, rows: int, seen: torch.Tensor) -> torch.Tensor:  # [b * t, C] -> [b * t, C]
        """The layer's output; seen [b, 1, t, t] bool."""
        x = self.norm1(x + self.attention(x, rows, seen))
        return self.norm2(x + self.mlp(x))


class SentenceEncoder(nn.Module):
    """Token ids to one vector a sentence."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids and attention_mask [b, t] int64, 1 on real tokens -> sentence embedding [b, C] of length 1."""
        batch, tokens = input_ids.shape
        # spelled out a query, because runtimes do not all stretch a mask over the queries
        seen = (attention_mask != 0).view(batch, 1, 1, tokens).expand(batch, 1, tokens, tokens)
        x = self.embeddings(input_ids).view(batch * tokens, -1)
        for layer in self.layers:
            x = layer(x, batch, seen)
        real = attention_mask.to(x.dtype).unsqueeze(-1)
        mean = (x.view(batch, tokens, -1) * real).sum(dim=1) / real.sum(dim=1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)
