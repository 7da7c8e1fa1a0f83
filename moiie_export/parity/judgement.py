"""From measured distances to checks, in the order they are judged: finite, then layer by layer routing and values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moiie_export.parity.measure import MODALITIES, Agreement, LayerMeasure, Measure
from moiie_export.parity.metrics import Error
from moiie_export.parity.report import Check, judge, tell
from moiie_export.recipe_parity import Bounds


def judge_measure(measured: Measure, bounds: Bounds, **place: Any) -> list[Check]:
    """All checks of one phase of one case.

    Layer by layer and not stage by stage: a wrong layer changes the routing of all that follow it, and the first
    failure should name the layer where the fault is.
    """
    checks = [*_finite(measured, place)]
    for layer in measured.layers:
        checks += _routing(layer, bounds, place)
        checks += _values(layer, bounds, place)
    checks.append(
        judge("logits", "error", measured.logits.value, bounds.logits_error, note=_spot(measured.logits), **place)
    )
    return checks


def judge_ties(measures: list[Measure], bounds: Bounds, **place: Any) -> list[Check]:
    """The share of ties among all routing decisions of a case; nothing for a model without a router."""
    decisions, ties = sum(each.decisions for each in measures), sum(each.ties for each in measures)
    if not decisions:
        return []
    share = ties / decisions
    note = f"{ties} of {decisions} decisions within {bounds.tie_margin:g}"
    return [judge("ties", "tie share", share, bounds.tie_fraction, note=note if ties else "", **place)]


def _finite(measured: Measure, place: dict[str, Any]) -> Iterator[Check]:
    for side, bad in (("", measured.bad), ("the PyTorch reference", measured.bad_reference)):
        lines = [f"{count} NaN or infinite in {name}" for name, count in bad.items()]
        match = re.search(r"\.(\d+)", next(iter(bad), ""))
        layer = None if match is None else int(match[1])
        where = " ".join(part for part in ("" if layer is None else f"layer {layer}", side) if part)
        if lines or not side:
            yield tell("finite", lines, where=where, layer=layer, **place)


def _routing(layer: LayerMeasure, bounds: Bounds, place: dict[str, Any]) -> Iterator[Check]:
    for modality in MODALITIES:
        agreement = layer.routing.get(modality)
        if agreement is None or not agreement.tokens:
            continue
        yield judge(
            "routing",
            "agreement",
            agreement.share,
            bounds.routing_agreement,
            where=f"layer {layer.layer} {modality}",
            layer=layer.layer,
            note=_routing_note(agreement),
            **place,
        )


def _routing_note(agreement: Agreement) -> str:
    parts = []
    if agreement.wrong:
        parts.append(f"{agreement.wrong} of {agreement.tokens} tokens, the first at position {agreement.first_wrong}")
    if agreement.ties:
        parts.append(f"{agreement.ties} ties")
    return "; ".join(parts)


def _values(layer: LayerMeasure, bounds: Bounds, place: dict[str, Any]) -> Iterator[Check]:
    where = {"where": f"layer {layer.layer}", "layer": layer.layer}
    for name in ("router logits", "expert weights", "hidden states"):
        found = layer.errors.get(name)
        if found is not None:
            yield judge(name, "error", found.value, bounds.hidden_error, note=_spot(found), **where, **place)
    keys, values = layer.errors["keys"], layer.errors["values"]
    found = values if values.worse(keys) else keys
    kind = "value" if found is values else "key"
    note = f"{kind}, {_spot(found)}" if _spot(found) else ""
    yield judge("KV cache", "error", found.value, bounds.kv_error, note=note, **where, **place)


def _spot(found: Error) -> str:
    """Where an error is largest; nothing is said of a perfect match."""
    if found.value == 0 or found.row is None:
        return ""
    return f"worst at position {found.row}" if found.step is None else f"worst at step {found.step}"
