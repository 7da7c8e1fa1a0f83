"""The mixture-of-experts block of every variant, from one table of expert groups (spec moiie.md, 1.6, 1.7, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moiie_export.model_config import MoeConfig, TextConfig
from moiie_export.ops.expert_dispatch import Watch, expert_dispatch, run_experts
from moiie_export.ops.modality_router import modality_router
from moiie_export.ops.topk_route import topk_route


@dataclass
class Routing:
    """What a block decided: ids and weights [N, k] of every token, and the logits [N, E] when there is a router."""

    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    router_logits: torch.Tensor | None


class Expert(nn.Module):
    """Weights of one expert: gate_up_proj [2I, H] in rows [gate | up], down_proj [H, I]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))


class MoeBlock(nn.Module):
    """Routes each token by its modality and runs the chosen experts; only reachable experts exist here."""

    def __init__(self, config: TextConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.moe = moe
        self.watch: Watch | None = None
        """Is shown what goes through each expert's projections, where activations are measured."""
        self.experts = nn.ModuleDict({str(e): Expert(config) for e in moe.reachable})
        if moe.gates:
            self.gate = nn.Linear(config.hidden_size, len(moe.expert_groups["language"]), bias=False)
            if not moe.one_gate:
                self.gate_vis = nn.Linear(config.hidden_size, len(moe.expert_groups["vision"]), bias=False)

    def forward(self, x: torch.Tensor, token_modality: torch.Tensor | None) -> tuple[torch.Tensor, Routing]:
        """x [N, H], token_modality [N] int32 (None: every token is language) -> output [N, H] and the routing."""
        routing = self.route(x, token_modality)
        ids = self.moe.reachable if token_modality is not None else tuple(sorted(self.moe.expert_groups["language"]))
        experts = [self.experts[str(e)] for e in ids]
        banks: tuple[list[Any], list[Any]] = (
            [expert.gate_up_proj for expert in experts],
            [expert.down_proj for expert in experts],
        )
        chosen = (routing.expert_ids, routing.expert_weights)
        if self.watch is not None:
            return run_experts(x, chosen, *banks, list(ids), self.watch), routing
        return expert_dispatch(x, *chosen, *banks, list(ids)), routing

    def route(self, x: torch.Tensor, token_modality: torch.Tensor | None) -> Routing:
        """The routing of x [N, H]; without gates the modality alone decides."""
        groups = self.moe.expert_groups
        if not self.moe.gates:
            only = {modality: ids[0] for modality, ids in groups.items()}
            ids = x.new_full((x.shape[0],), only["language"], dtype=torch.int32)
            if token_modality is not None:
                ids = torch.where(token_modality == 1, only["vision"], ids)
            return Routing(ids.unsqueeze(1), x.new_ones((x.shape[0], 1)), None)
        two_gates = token_modality is not None and not self.moe.one_gate
        logits = modality_router(
            x,
            self.gate.weight,
            token_modality if two_gates else None,
            self.gate_vis.weight if two_gates else None,
            list(groups["language"]),
            list(groups["vision"]),
            self.moe.num_experts,
        )
        ids, weights = topk_route(logits, self.moe.top_k)
        return Routing(ids, weights, logits)
