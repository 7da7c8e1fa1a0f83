"""Distances between the two sides of one decoder call, per layer, and their worst over several calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moiie_export.parity.metrics import (
    Array,
    Error,
    dense_weights,
    error,
    error_by_row,
    margin_histogram,
    non_finite,
    same_experts,
)
from moiie_export.parity.reference import Decisions, Inputs, ReferenceRun
from moiie_export.parity.trace import Routed, Trace

MODALITIES = ("language", "vision")


@dataclass(frozen=True)
class Agreement:
    """Routing of one layer's tokens of one modality.

    Attributes:
        tokens: how many there were.
        ties: routed otherwise within the tie margin.
        wrong: routed otherwise beyond it.
        first_wrong: position of the first of these.
        margins: histogram of the reference's margins.
        reached: tokens by expert, in the reference.
        bundle_reached: the same in the bundle; ids that no expert has are left out.
    """

    tokens: int
    ties: int
    wrong: int
    first_wrong: int | None
    margins: list[int]
    reached: list[int]
    bundle_reached: list[int]

    @property
    def share(self) -> float:
        """Share of the tokens, ties apart, that went to the same experts."""
        judged = self.tokens - self.ties
        return 1.0 if judged == 0 else 1 - self.wrong / judged

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.tokens + other.tokens,
            self.ties + other.ties,
            self.wrong + other.wrong,
            self.first_wrong if self.first_wrong is not None else other.first_wrong,
            [a + b for a, b in zip(self.margins, other.margins, strict=True)],
            [a + b for a, b in zip(self.reached, other.reached, strict=True)],
            [a + b for a, b in zip(self.bundle_reached, other.bundle_reached, strict=True)],
        )


@dataclass(frozen=True)
class LayerMeasure:
    """One decoder layer: routing by modality (sparse layers only) and errors by what was compared."""

    layer: int
    routing: dict[str, Agreement]
    errors: dict[str, Error]


@dataclass(frozen=True)
class Measure:
    """One phase of one case.

    Attributes:
        layers: by layer.
        logits: the error of the logits.
        bad: name -> NaN and infinities among what the bundle gave; in layer order.
        bad_reference: the same of the reference.
        by_position: logits error of each position kept, and whether the best token is the same.
    """

    layers: list[LayerMeasure]
    logits: Error
    bad: dict[str, int]
    bad_reference: dict[str, int]
    by_position: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def ties(self) -> int:
        """Routing ties in all layers."""
        return sum(agreement.ties for layer in self.layers for agreement in layer.routing.values())

    @property
    def decisions(self) -> int:
        """Routing decisions in all layers."""
        return sum(agreement.tokens for layer in self.layers for agreement in layer.routing.values())


def measure(actual: Trace, run: ReferenceRun, inputs: Inputs, num_experts: int) -> Measure:
    """Compare one row of the bundle with the reference, cache slots up to what the row holds."""
    expected = run.trace
    layers = []
    for index, hidden in enumerate(expected.hidden):
        errors: dict[str, Error] = {}
        routing: dict[str, Agreement] = {}
        if index in expected.routing and index in actual.routing:
            routed = (actual.routing[index], expected.routing[index])
            routing = _agreements(routed[0], run.decisions[index], routed[1], inputs.is_vision, num_experts)
            errors |= _router_errors(*routed, num_experts)
        ours_hidden = actual.hidden[index]
        if ours_hidden is not None and hidden is not None:
            errors["hidden states"] = error(ours_hidden, hidden)
        for name, ours, theirs in (("keys", actual.keys, expected.keys), ("values", actual.values, expected.values)):
            errors[name] = error(_slots(ours[index], inputs.stop), _slots(theirs[index], inputs.stop))
        layers.append(LayerMeasure(index, routing, errors))
    return Measure(
        layers,
        error(actual.logits, expected.logits),
        _bad(actual, inputs.stop),
        _bad(expected, inputs.stop),
        _positions(actual.logits, expected.logits),
    )


def worst(measures: Sequence[Measure]) -> Measure:
    """Of several steps the sum of their routing and the largest of each error, with its step."""
    total = _at_step(measures[0], 0)
    for step, other in enumerate(measures[1:], 1):
        later = _at_step(other, step)
        layers = [_worse_layer(a, b) for a, b in zip(total.layers, later.layers, strict=True)]
        total = Measure(
            layers,
            _worse(total.logits, later.logits),
            {**later.bad, **total.bad},
            {**later.bad_reference, **total.bad_reference},
            [*total.by_position, *later.by_position],
        )
    return total


def _at_step(measured: Measure, step: int) -> Measure:
    layers = [
        replace(layer, errors={name: replace(item, step=step) for name, item in layer.errors.items()})
        for layer in measured.layers
    ]
    return replace(measured, layers=layers, logits=replace(measured.logits, step=step))


def _worse_layer(first: LayerMeasure, second: LayerMeasure) -> LayerMeasure:
    return LayerMeasure(
        first.layer,
        {modality: agreement + second.routing[modality] for modality, agreement in first.routing.items()},
        {name: _worse(item, second.errors[name]) for name, item in first.errors.items()},
    )


def _worse(first: Error, second: Error) -> Error:
    return second if second.worse(first) and not np.isnan(first.value) else first


def _slots(buffer: Array, stop: int) -> Array:
    """The filled part [stop, heads, D] of a buffer [heads, S, D]."""
    return buffer[:, :stop].swapaxes(0, 1)


def _agreements(
    actual: Routed, decisions: Decisions, followed: Routed, is_vision: Array, num_experts: int
) -> dict[str, Agreement]:
    """Agreement of each modality. The reference followed the bundle at ties, so what is left is wrong."""
    wrong = ~same_experts(actual.expert_ids, followed.expert_ids)
    result = {}
    for modality, chosen in zip(MODALITIES, (~is_vision, is_vision), strict=True):
        rows = np.flatnonzero(wrong & chosen)
        result[modality] = Agreement(
            tokens=int(chosen.sum()),
            ties=int((decisions.tie & chosen).sum()),
            wrong=len(rows),
            first_wrong=int(rows[0]) if len(rows) else None,
            margins=margin_histogram(decisions.margin[chosen]),
            reached=_by_expert(decisions.own[chosen], num_experts),
            bundle_reached=_by_expert(actual.expert_ids[chosen], num_experts),
        )
    return result


def _by_expert(expert_ids: Array, num_experts: int) -> list[int]:
    valid = expert_ids[(expert_ids >= 0) & (expert_ids < num_experts)]
    return [int(count) for count in np.bincount(valid, minlength=num_experts)]


def _router_errors(actual: Routed, expected: Routed, num_experts: int) -> dict[str, Error]:
    errors = {}
    if expected.router_logits is not None and actual.router_logits is not None:
        errors["router logits"] = error(actual.router_logits, expected.router_logits)
    dense = [dense_weights(side.expert_ids, side.expert_weights, num_experts) for side in (actual, expected)]
    errors["expert weights"] = error(*dense)
    return errors


def _bad(trace: Trace, stop: int) -> dict[str, int]:
    """NaN and infinities by value name, those of the first layer first."""
    counts: dict[str, int] = {}
    for index, hidden in enumerate(trace.hidden):
        routed = trace.routing.get(index)
        if routed is not None:
            if routed.router_logits is not None:
                counts[f"router_logits.{index}"] = non_finite(routed.router_logits, minus_infinity=True)
            counts[f"expert_weights.{index}"] = non_finite(routed.expert_weights)
        if hidden is not None:
            counts[f"hidden.{index}"] = non_finite(hidden)
        for kind, buffers in (("key", trace.keys), ("value", trace.values)):
            counts[f"present.{index}.{kind}"] = non_finite(_slots(buffers[index], stop))
    counts["logits"] = non_finite(trace.logits)
    return {name: count for name, count in counts.items() if count}


def _positions(actual: Array, expected: Array) -> list[tuple[float, bool]]:
    errors = error_by_row(actual, expected)
    same: Any = actual.argmax(axis=-1) == expected.argmax(axis=-1)
    return [(float(value), bool(agrees)) for value, agrees in zip(errors, same, strict=True)]
