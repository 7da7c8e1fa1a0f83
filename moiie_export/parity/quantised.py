"""What quantisation costs: the bundle's weights against the checkpoint's, each in a model of its own from end to end.

The stages before show that the graphs compute what the stored weights say. Here both sides are PyTorch, layer by layer,
and neither is taught by the other, so that errors add up as they do in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moiie_export.model.layerwise import LayerByLayer, Row, RowResult
from moiie_export.model.prompts import Asked, decoder_rows, lay_out_questions
from moiie_export.parity.cases import Question
from moiie_export.parity.measure import MODALITIES
from moiie_export.parity.metrics import error, same_experts
from moiie_export.parity.report import COARSE, Check, judge
from moiie_export.parity.stored import StoredWeights
from moiie_export.recipe_parity import BoundsByDtype, QuantizedBounds
from moiie_export.source import ModelSource
from moiie_runtime.bundle import Bundle

PHASE = "quantisation"
_STRICTNESS = ("int4", "fp8", "int8")
"""Formats, the coarsest first: it sets the bounds of a bundle that has several."""


def stored_formats(bundle: Bundle) -> list[str]:
    """The formats of a bundle's quantised weights, the coarsest first; empty when none is quantised."""
    return sorted(set(bundle.quantization.values()), key=lambda name: (*_STRICTNESS, name).index(name))


def bounds_of(formats: Iterable[str]) -> list[str]:
    """The kinds of bounds that weights of these formats are judged by."""
    return sorted({"int8" if name == "w8a8" else name for name in formats})


def quantised_bounds(formats: Iterable[str], bounds: BoundsByDtype) -> QuantizedBounds:
    """The bounds of a bundle whose weights have these formats."""
    found = set(formats)
    coarsest = next((name for name in _STRICTNESS if name in found), "int8")
    result: QuantizedBounds = getattr(bounds, coarsest)
    return result


def compare_quantised(
    source: ModelSource,
    stored: StoredWeights,
    questions: Sequence[Question],
    bounds: QuantizedBounds,
    progress: Callable[[str, int, int], None],
) -> tuple[list[Check], dict[str, Any]]:
    """Both models on the same prompts.

    Returns:
        Checks: logits and best tokens of each case, routing of each modality over all layers and cases. And the numbers
        behind them: agreement by layer and modality, and by case.
    """
    asked = lay_out_questions(source, questions)

    def half(first: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(PHASE, first * total + done, 2 * total)

    sides: list[tuple[list[Row], list[RowResult]]] = []
    for number, read in enumerate((None, stored.read)):
        parts = LayerByLayer(source, read)
        rows = decoder_rows(parts, asked)
        sides.append((rows, parts.decode(rows, advance=half(number))))
    (rows, exact), (_, quantised) = sides
    checks, cases = _answers(asked, exact, quantised, bounds)
    routing = _routing(rows, exact, quantised)
    for modality in MODALITIES:
        checks += _routing_check(modality, routing, bounds)
    return checks, {"cases": cases, "routing": routing}


def _answers(
    asked: Sequence[Asked], exact: Sequence[RowResult], quantised: Sequence[RowResult], bounds: QuantizedBounds
) -> tuple[list[Check], list[dict[str, Any]]]:
    checks, cases = [], []
    for each, wanted, found in zip(asked, exact, quantised, strict=True):
        place: dict[str, Any] = {"case": each.name}
        value = error(found.logits, wanted.logits).value
        same = found.logits.argmax(axis=1) == wanted.logits.argmax(axis=1)
        note = f"{int(same.sum())} of {len(same)} positions" if not same.all() else ""
        checks.append(judge(COARSE[0], "error", value, bounds.logits_error, **place))
        checks.append(judge(COARSE[1], "agreement", float(same.mean()), bounds.top1_agreement, note=note, **place))
        cases.append({"case": each.name, "logits_error": value, "top1_agreement": float(same.mean())})
    return checks, cases


def _routing(
    rows: Sequence[Row], exact: Sequence[RowResult], quantised: Sequence[RowResult]
) -> dict[str, dict[str, dict[str, int]]]:
    """Modality -> layer -> how many tokens there were, and how many went to the same experts."""
    found: dict[str, dict[str, dict[str, int]]] = {modality: {} for modality in MODALITIES}
    for row, wanted, actual in zip(rows, exact, quantised, strict=True):
        for layer, ids in wanted.expert_ids.items():
            same = same_experts(actual.expert_ids[layer], ids)
            for modality, chosen in zip(MODALITIES, (row.modality != 1, row.modality == 1), strict=True):
                counts = found[modality].setdefault(str(layer), {"tokens": 0, "same": 0})
                counts["tokens"] += int(chosen.sum())
                counts["same"] += int((same & chosen).sum())
    return found


def _routing_check(
    modality: str, routing: Mapping[str, Mapping[str, Mapping[str, int]]], bounds: QuantizedBounds
) -> list[Check]:
    layers = {layer: counts for layer, counts in routing[modality].items() if counts["tokens"]}
    if not layers:
        return []
    tokens, same = (sum(counts[name] for counts in layers.values()) for name in ("tokens", "same"))
    shares = {layer: counts["same"] / counts["tokens"] for layer, counts in layers.items()}
    worst = min(shares, key=lambda layer: shares[layer])
    share = same / tokens
    note = f"lowest in layer {worst}: {shares[worst]:.3f}" if share < 1 else ""
    place: dict[str, Any] = {"where": modality, "note": note}
    return [judge(COARSE[2], "agreement", share, bounds.routing_agreement, **place)]
