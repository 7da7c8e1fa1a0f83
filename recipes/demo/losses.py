"""The authors' training loss: cross entropy of the answers plus load balancing of each modality (spec moiie.md, 1.9)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits [n, V] against labels [n]."""
    return F.cross_entropy(logits.float(), labels)


def balance_loss(
    router_logits: list[torch.Tensor], tokens: torch.Tensor, experts: tuple[int, ...], top_k: int
) -> torch.Tensor:
    """Switch-style load balancing over one modality's experts; `top_k` when balanced, 0 without such tokens.

    Args:
        router_logits: of each layer [N, E].
        tokens: [N] bool, the tokens of this modality that are not padding.
        experts: ids the modality may reach.
        top_k: experts a token.
    """
    logits = torch.cat([layer[tokens][:, list(experts)] for layer in router_logits])
    if not len(logits):
        return logits.new_zeros(())
    probabilities = logits.softmax(dim=-1)
    chosen = F.one_hot(probabilities.topk(top_k, dim=-1).indices, len(experts)).float()
    return len(experts) * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()
