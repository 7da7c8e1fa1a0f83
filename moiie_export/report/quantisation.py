"""What quantisation costs: the checkpoint's model and that of the stored weights, each on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiie_export.report.document import Document, real
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import percent
from moiie_export.report.section import Section
from moiie_export.report.table import table


def section(document: Document) -> Section | None:
    """Tables by case, and by layer and modality; None for a bundle without quantised weights."""
    found: Mapping[str, Any] | None = document.data.get("quantisation")
    if found is None:
        return None
    lead = tag(
        "p",
        f"Both models run in PyTorch from end to end on the same prompts, one with the checkpoint’s weights in float32 and "
        f"one with what the bundle’s {', '.join(found['formats'])} weights stand for, so errors add up as they do in use.",
        class_="lead",
    )
    cases = [
        [case["case"], real(case["logits_error"]), percent(real(case["top1_agreement"]))] for case in found["cases"]
    ]
    return Section("quantisation", "Quantisation", join([lead, _answers(cases), _routing(found["routing"])]))


def _answers(cases: list[list[Any]]) -> Any:
    return table("answers by case", ["case", "logits error", "same best token"], cases)


def _routing(routing: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Any:
    """Share of tokens that both models send to the same experts."""
    rows = [
        [int(layer), modality, counts["tokens"], percent(counts["same"] / counts["tokens"])]
        for modality, layers in routing.items()
        for layer, counts in layers.items()
        if counts["tokens"]
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: (row[0], row[1]))
    return table("routing by layer and modality", ["layer", "modality", "tokens", "same experts"], rows)
