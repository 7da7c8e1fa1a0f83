"""What one call of the decoder computed, on either side of the comparison.

Shapes: B rows, T tokens a row, H hidden, k experts a token, E experts, S cache slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moiie_export.parity.metrics import Array


@dataclass(frozen=True)
class Routed:
    """One layer's routing: expert_ids and expert_weights [.., T, k]; router_logits [.., T, E], None without a router."""

    expert_ids: Array
    expert_weights: Array
    router_logits: Array | None


@dataclass(frozen=True)
class Trace:
    """Of a batch: logits [B, kept, V], hidden per layer [B, T, H], keys and values per layer [B, heads, S, D].

    A built engine may keep its hidden states to itself: they are None then. `row` gives the same of one row, without
    the first axis.
    """

    logits: Array
    hidden: tuple[Array | None, ...]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    routing: Mapping[int, Routed]

    def row(self, index: int, tokens: int) -> Trace:
        """One row, cut to its own tokens; padding behind them is noise."""
        return Trace(
            self.logits[index],
            tuple(None if layer is None else layer[index, :tokens] for layer in self.hidden),
            tuple(layer[index] for layer in self.keys),
            tuple(layer[index] for layer in self.values),
            {
                layer: Routed(
                    routed.expert_ids[index, :tokens],
                    routed.expert_weights[index, :tokens],
                    None if routed.router_logits is None else routed.router_logits[index, :tokens],
                )
                for layer, routed in self.routing.items()
            },
        )
