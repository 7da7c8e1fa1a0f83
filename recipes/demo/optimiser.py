"""Which optimiser moves which parameter.

Matrices of the decoder's layers learn by Muon (momentum with orthogonalised updates) once the model answers questions:
to find the thing that a question names is learned in a third of AdamW's steps. Everything else learns by AdamW: tables,
vectors, router gates, the tower and the projector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

DECAY = 0.05


class Optimiser:
    """AdamW, beside Muon where a stage uses it, as one.

    Args:
        parameters: share of the learning rate -> parameters that get it.
        muon: ids of the parameters that learn by Muon; empty for AdamW alone.
    """

    def __init__(self, parameters: dict[float, list[nn.Parameter]], muon: frozenset[int]) -> None:
        groups = [_groups(members, share, muon) for share, members in parameters.items()]
        orthogonal = [group for pair in groups for group in pair[0] if group["params"]]
        plain = [group for pair in groups for group in pair[1] if group["params"]]
        self._optimisers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(plain, lr=1e-3, betas=(0.9, 0.98), fused=True)
        }
        if orthogonal:
            self._optimisers["muon"] = torch.optim.Muon(
                orthogonal, lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        self.parameters = [parameter for members in parameters.values() for parameter in members]

    def step(self, learning_rate: float) -> None:
        """Move every parameter by its share of the learning rate."""
        for optimiser in self._optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = group["share"] * learning_rate
            optimiser.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimiser in self._optimisers.values():
            optimiser.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved one stood."""
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(state[name])


def _groups(
    members: list[nn.Parameter], share: float, muon: frozenset[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for Muon and for AdamW; vectors do not decay."""
    ours = [parameter for parameter in members if id(parameter) in muon]
    rest = [parameter for parameter in members if id(parameter) not in muon]
    return [{"params": ours, "weight_decay": DECAY, "share": share}], [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": DECAY, "share": share},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0, "share": share},
    ]
