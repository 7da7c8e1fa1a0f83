"""Which experts the tokens of a request went to, and statistics of it per layer, expert and modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError
from moiie_runtime.prompt import LANGUAGE, VISION

MODALITIES = {"language": LANGUAGE, "vision": VISION}


@dataclass(frozen=True)
class LayerRouting:
    """Experts chosen in one sparse layer.

    Attributes:
        expert_ids: int32 [..., top_k], global expert ids.
        expert_weights: float32 [..., top_k].
    """

    expert_ids: NDArray[np.int32]
    expert_weights: NDArray[np.float32]

    def __getitem__(self, index: Any) -> LayerRouting:
        return LayerRouting(self.expert_ids[index], self.expert_weights[index])


@dataclass(frozen=True)
class Routing:
    """All routing decisions of one request, by layer.

    Attributes:
        token_modality: int32 [prompt length], as the router saw it; answer tokens are language.
        prefill: [prompt length, top_k] each.
        decode: [steps, top_k] each; one step for each answer token but the last, which is never run.
        num_experts: experts of a layer.
    """

    token_modality: NDArray[np.int32]
    prefill: Mapping[int, LayerRouting]
    decode: Mapping[int, LayerRouting]
    num_experts: int

    def stats(self) -> RoutingStats:
        """Counts and weight sums over prompt and answer."""
        layers = tuple(self.prefill)
        shape = (len(layers), self.num_experts, len(MODALITIES))
        counts, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float64)
        for index, layer in enumerate(layers):
            for chosen, modality in (
                (self.prefill[layer], self.token_modality),
                (self.decode[layer], np.full(len(self.decode[layer].expert_ids), LANGUAGE)),
            ):
                where = (chosen.expert_ids, np.broadcast_to(modality[:, None], chosen.expert_ids.shape))
                np.add.at(counts[index], where, 1)
                np.add.at(weights[index], where, chosen.expert_weights)
        return RoutingStats(layers, counts, weights)


@dataclass(frozen=True)
class RoutingStats:
    """How often each expert was chosen, and with what weight. Statistics of several requests can be added.

    Attributes:
        layers: decoder layers with experts, rising.
        counts: int64 [layers, experts, 2]; the last axis is indexed by `LANGUAGE` and `VISION`. A token counts once
            for each expert it chose.
        weight_sums: float64 [layers, experts, 2], the sum of the routing weights.
    """

    layers: tuple[int, ...]
    counts: NDArray[np.int64]
    weight_sums: NDArray[np.float64]

    def __add__(self, other: RoutingStats) -> RoutingStats:
        if self.layers != other.layers or self.counts.shape != other.counts.shape:
            raise MoiieError("routing statistics of two different models cannot be added")
        return RoutingStats(self.layers, self.counts + other.counts, self.weight_sums + other.weight_sums)

    def rows(self) -> list[dict[str, Any]]:
        """One record for each layer, modality and expert: `layer`, `modality`, `expert`, `tokens`, `mean_weight`."""
        return [
            {
                "layer": layer,
                "modality": name,
                "expert": expert,
                "tokens": int(self.counts[index, expert, modality]),
                "mean_weight": float(
                    self.weight_sums[index, expert, modality] / max(1, self.counts[index, expert, modality])
                ),
            }
            for index, layer in enumerate(self.layers)
            for name, modality in MODALITIES.items()
            for expert in range(self.counts.shape[1])
        ]
