"""The checkpoint's side: the PyTorch model, run one row at a time, and the rule by which router ties are settled.

Where the bundle chose other experts for a token and the router's probabilities are so close that rounding may decide,
the reference takes the bundle's choice too: it is a tie, it is counted, and everything behind it stays comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moiie_export.model.layers import KeyValue
from moiie_export.model.moe import MoeBlock, Routing
from moiie_export.parity.metrics import Array, same_experts
from moiie_export.parity.trace import Routed, Trace


@dataclass(frozen=True)
class Decisions:
    """A sparse layer's decisions in one call, per token.

    Attributes:
        own: expert ids [T, k] of the reference's own router.
        tie: [T] bool; the bundle differs within the margin, and the reference followed it.
        margin: [T] gap between the k-th and the next router probability; infinite without a router.
    """

    own: Array
    tie: Array
    margin: Array


@dataclass(frozen=True)
class Inputs:
    """One row of decoder input.

    Attributes:
        embeds: [T, H] float32.
        modality: [T] int32, 1 = vision; None in decode.
        start: tokens already in the cache.
        kept: indices of the tokens whose logits are wanted.
        adapters: [L] the adapter of each layer that has some; None in a family without.
    """

    embeds: Array
    modality: Array | None
    start: int
    kept: Array
    adapters: Array | None = None

    @property
    def stop(self) -> int:
        """Tokens in the cache afterwards."""
        return self.start + len(self.embeds)

    @property
    def is_vision(self) -> Array:
        """[T] bool."""
        is_vision: Array = np.zeros(len(self.embeds), bool) if self.modality is None else self.modality == 1
        return is_vision


@dataclass(frozen=True)
class ReferenceRun:
    """One row's trace, its routing decisions by layer, and the buffers to go on from."""

    trace: Trace
    decisions: Mapping[int, Decisions]
    present: list[KeyValue]

    def serves(self, guide: Mapping[int, Array]) -> bool:
        """Whether following `guide` (layer -> expert ids [T, k]) would give this run again."""
        return all(same_experts(self.trace.routing[layer].expert_ids, ids).all() for layer, ids in guide.items())


class Reference:
    """The PyTorch model of a checkpoint in float32.

    Args:
        model: the family's, loaded with weights as the bundle stores them.
        tie_margin: a gap of router probabilities below this may fall either way.
    """

    def __init__(self, model: Any, tie_margin: float) -> None:
        self.model = model
        self._tie_margin = tie_margin
        self._blocks = {
            index: layer.mlp for index, layer in enumerate(model.decoder.layers) if isinstance(layer.mlp, MoeBlock)
        }

    @torch.inference_mode()
    def embed(self, ids: Array) -> Array:
        """Rows [n, H] of the embedding table."""
        rows: Array = self.model.embed_tokens(torch.from_numpy(np.asarray(ids, np.int64))).numpy()
        return rows

    @torch.inference_mode()
    def run(self, inputs: Inputs, past: list[KeyValue], guide: Mapping[int, Array]) -> ReferenceRun:
        """One call of the decoder.

        Args:
            inputs: the row.
            past: buffers; left as they are.
            guide: layer -> expert ids [T, k] that the bundle chose, followed at ties.
        """
        modality = None if inputs.modality is None else torch.from_numpy(inputs.modality)[None]
        with self._following(guide) as decisions:
            out = self.model.decoder(
                torch.from_numpy(inputs.embeds)[None],
                modality,
                torch.tensor([inputs.start]),
                torch.from_numpy(inputs.kept)[None],
                past,
                None if inputs.adapters is None else self.model.mole.choose(torch.from_numpy(inputs.adapters)[None]),
            )
        routing = {layer: routed for layer, routed in enumerate(out.routing) if routed is not None}
        trace = Trace(
            out.logits[0].numpy(),
            tuple(hidden.numpy() for hidden in out.hidden),
            tuple(key[0].numpy() for key, _ in out.present),
            tuple(value[0].numpy() for _, value in out.present),
            {layer: _routed(routed) for layer, routed in routing.items()},
        )
        return ReferenceRun(trace, decisions, out.present)

    @contextmanager
    def _following(self, guide: Mapping[int, Array]) -> Iterator[dict[int, Decisions]]:
        """While open, each expert block's `route` settles ties by the guide and records what it decided."""
        decisions: dict[int, Decisions] = {}

        def shadow(layer: int, block: MoeBlock) -> None:
            def route(x: torch.Tensor, token_modality: torch.Tensor | None) -> Routing:
                own = MoeBlock.route(block, x, token_modality)
                routing, decisions[layer] = _settle(own, guide.get(layer), self._tie_margin)
                return routing

            block.__dict__["route"] = route

        try:
            for layer, block in self._blocks.items():
                shadow(layer, block)
            yield decisions
        finally:
            for block in self._blocks.values():
                block.__dict__.pop("route", None)


def _settle(own: Routing, guide: Array | None, tie_margin: float) -> tuple[Routing, Decisions]:
    """Take the guide's experts for tokens at a tie; a choice the modality may not make is never one."""
    ids = own.expert_ids.numpy()
    nothing = np.zeros(len(ids), bool)
    if own.router_logits is None:
        return own, Decisions(ids, nothing, np.full(len(ids), np.inf))
    probabilities = own.router_logits.float().softmax(dim=-1).numpy()
    top_k, experts = ids.shape[1], probabilities.shape[1]
    falling = -np.sort(-np.pad(probabilities, ((0, 0), (0, 1))), axis=1)
    margin = falling[:, top_k - 1] - falling[:, top_k]
    if guide is None:
        return own, Decisions(ids, nothing, margin)
    chosen = np.clip(guide, 0, experts - 1).astype(np.int64)
    allowed = (chosen == guide).all(axis=1) & np.isfinite(np.take_along_axis(own.router_logits.numpy(), chosen, 1)).all(
        1
    )
    allowed &= (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all(axis=1)
    given_up, taken = _exchanged(ids, chosen, probabilities)
    tie = ~same_experts(ids, guide) & allowed & (given_up - taken < tie_margin)
    if not tie.any():
        return own, Decisions(ids, tie, margin)
    followed = np.where(tie[:, None], chosen, ids)
    weights = np.take_along_axis(probabilities, followed, 1)
    routing = Routing(
        torch.from_numpy(followed.astype(np.int32)),
        torch.from_numpy(weights / weights.sum(axis=1, keepdims=True)),
        own.router_logits,
    )
    return routing, Decisions(ids, tie, margin)


def _exchanged(own: Array, chosen: Array, probabilities: Array) -> tuple[Array, Array]:
    """Of each token the highest probability among experts given up, and the lowest among those taken instead."""
    picked = [np.zeros(probabilities.shape, bool) for _ in range(2)]
    for mask, ids in zip(picked, (own.astype(np.int64), chosen), strict=True):
        np.put_along_axis(mask, ids, True, axis=1)
    ours, theirs = picked
    given_up = np.where(ours & ~theirs, probabilities, 0).max(axis=1)
    taken = np.where(theirs & ~ours, probabilities, 1).min(axis=1)
    return given_up, taken


def _routed(routing: Routing) -> Routed:
    logits = None if routing.router_logits is None else routing.router_logits.numpy()
    return Routed(routing.expert_ids.numpy(), routing.expert_weights.numpy(), logits)
