"""What quantisation costs: the checkpoint's model and that of the stored weights, each on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from moiie_export.report.document import Document, real
from moiie_export.report.html import tag
from moiie_export.report.numbers import Share, percent, short
from moiie_export.report.section import Section
from moiie_export.report.table import figures, table

Routing = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Modality -> layer -> tokens, and how many of them both models send to the same experts."""


def section(document: Document) -> Section | None:
    """Tables by case, and by layer and modality; None for a bundle without quantised weights."""
    found: Mapping[str, Any] | None = document.data.get("quantisation")
    if found is None:
        return None
    formats = " and ".join(found["formats"])
    lead = tag(
        "p",
        f"Both models run in PyTorch from end to end on the same prompts, one with the checkpoint’s weights in float32 and "
        f"one with what the bundle’s {formats} weights stand for, so errors add up as they do in use.",
        class_="lead",
    )
    seen = _tokens(found["routing"])
    parts = [_answers(found["cases"]), _routing(found["routing"], [*seen])]
    body = (lead, _accepted(found["bounds"], seen), figures(part for part in parts if part is not None))
    return Section("quantisation", "Quantisation", Markup("").join(body))


def _tokens(routing: Routing) -> dict[str, int]:
    """Modality -> tokens that are routed in each layer; only those that there are."""
    seen = {name: max((each["tokens"] for each in layers.values()), default=0) for name, layers in routing.items()}
    return {name: tokens for name, tokens in seen.items() if tokens}


def _accepted(bounds: Mapping[str, Any], seen: Mapping[str, int]) -> Markup:
    text = (
        f"A logits error is the largest difference as a share of the largest logit. Accepted are errors up to "
        f"{short(real(bounds['logits_error']))} and the same best token at {_percent(bounds['top1_agreement'])} of the "
        f"positions"
    )
    if seen:
        tokens = " and ".join(f"{count} {name}" for name, count in seen.items())
        text += (
            f", and the same experts for {_percent(bounds['routing_agreement'])} of a modality’s tokens, all layers "
            f"together; there are {tokens} tokens"
        )
    return tag("p", f"{text}.", class_="lead")


def _percent(share: Any) -> str:
    return percent(real(share)).replace(" ", "\N{NO-BREAK SPACE}")


def _answers(cases: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [[case["case"], real(case["logits_error"]), Share(real(case["top1_agreement"]))] for case in cases]
    return table("answers by case", ["case", "logits error", "same best token"], rows)


def _routing(routing: Routing, modalities: Sequence[str]) -> Markup | None:
    """Share of tokens that both models send to the same experts, a row a layer."""
    layers = sorted({int(layer) for modality in modalities for layer in routing[modality]})
    if not layers:
        return None
    rows = [[layer, *(_share(routing[modality].get(str(layer))) for modality in modalities)] for layer in layers]
    return table("same experts by layer", ["layer", *modalities], rows)


def _share(counts: Mapping[str, int] | None) -> Share | None:
    return Share(counts["same"] / counts["tokens"]) if counts and counts["tokens"] else None
