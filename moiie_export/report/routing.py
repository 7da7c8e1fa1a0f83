"""Routing heat map: of the tokens of a modality, how many went to each expert of each layer, and whether both sides agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moiie_export.report.document import Document
from moiie_export.report.heat_map import Cell, Row, heat_map
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import Share, counted, listed, percent
from moiie_export.report.section import Section
from moiie_export.report.svg import Drawing
from moiie_export.report.table import figure, figures, folded, table


@dataclass
class LayerRouting:
    """Tokens of one modality in one layer, over all cases and phases.

    Attributes:
        tokens, ties, wrong: decisions, those settled as ties, and those that differ.
        reference, bundle: tokens by expert on each side.
        allowed: by expert, whether the modality may go there.
    """

    tokens: int
    ties: int
    wrong: int
    reference: list[int]
    bundle: list[int]
    allowed: list[bool]

    @property
    def agreement(self) -> float:
        """Share of the tokens, ties apart, that went to the same experts."""
        judged = self.tokens - self.ties
        return 1.0 if judged == 0 else 1 - self.wrong / judged


@dataclass(frozen=True)
class ModalityRouting:
    """One modality's layers, ascending."""

    modality: str
    layers: dict[int, LayerRouting]

    @property
    def wrong_layers(self) -> list[int]:
        """Layers where tokens went elsewhere."""
        return [layer for layer, found in self.layers.items() if found.wrong]

    @property
    def same(self) -> bool:
        """Whether both sides sent the same number of tokens everywhere."""
        return all(found.reference == found.bundle for found in self.layers.values())

    def description(self) -> str:
        """What there is to see, in words."""
        tokens = max(found.tokens for found in self.layers.values())
        where = f"Layers {listed(list(self.layers))}, {counted(tokens, f'{self.modality} token')} in each."
        ties = sum(found.ties for found in self.layers.values())
        tied = f" {counted(ties, 'tie')}." if ties else ""
        if not self.wrong_layers:
            return f"{where} All tokens go to the same experts on both sides.{tied}"
        return f"{where} Tokens go to other experts in layer {listed(self.wrong_layers)}.{tied}"


def modality_routing(document: Document) -> list[ModalityRouting]:
    """What was routed, by modality and layer; empty for a model without experts."""
    groups = (document.moe or {}).get("expert_groups", {})
    result: dict[str, dict[int, LayerRouting]] = {}
    for _, layer, modality, found in document.routed():
        experts = len(found["reached"])
        layers = result.setdefault(modality, {})
        if layer not in layers:
            group = groups.get(modality, range(experts))
            allowed = [expert in group for expert in range(experts)]
            layers[layer] = LayerRouting(0, 0, 0, [0] * experts, [0] * experts, allowed)
        total = layers[layer]
        total.tokens, total.ties, total.wrong = (
            getattr(total, name) + found[name] for name in ("tokens", "ties", "wrong")
        )
        total.reference = [a + b for a, b in zip(total.reference, found["reached"], strict=True)]
        total.bundle = [a + b for a, b in zip(total.bundle, found["bundle_reached"], strict=True)]
    return [
        ModalityRouting(modality, dict(sorted(layers.items())))
        for modality, layers in result.items()
        if any(found.tokens for found in layers.values())
    ]


def section(document: Document) -> Section | None:
    """The heat maps; None for a model without experts."""
    found = modality_routing(document)
    if not found:
        return None
    lead = tag(
        "p",
        "Of each layer’s tokens, the percentage that reached each expert, over all cases; the highest of a chart has the "
        "strongest colour. Experts marked “·” are closed to the modality. “Agree” is the share of tokens that both sides "
        "send to the same experts, ties apart.",
        class_="lead",
    )
    drawn = [_figures(each, f"routing-{index}", document) for index, each in enumerate(found)]
    same = [side for sides in drawn if len(sides) == 1 for side in sides]
    pairs = [figures(sides) for sides in drawn if len(sides) > 1]
    ties = folded("Decisions and ties", _decisions(document))
    return Section("routing", "Routing", join([lead, figures(same) if same else None, pairs, ties]))


def _figures(routing: ModalityRouting, name: str, document: Document) -> list[Markup]:
    """One heat map where both sides sent as many tokens everywhere, else one of each side."""
    numbers = _table(routing.modality, document)
    wrong = routing.wrong_layers
    verdict = f"other experts in layer {listed(wrong)}" if wrong else "the same experts"
    caption = join([tag("strong", f"{routing.modality} tokens"), f": {verdict}"])
    drawing = _draw(routing, name, "PyTorch", lambda layer: layer.reference)
    if routing.same:
        return [figure(drawing, caption, numbers)]
    other = _draw(routing, f"{name}-bundle", "bundle", lambda layer: layer.bundle)
    aside = join([tag("strong", f"{routing.modality} tokens"), " in the bundle; what differs is framed"])
    return [figure(drawing, join([caption, " (PyTorch)"]), numbers), figure(other, aside)]


def _draw(routing: ModalityRouting, name: str, side: str, counts: Callable[[LayerRouting], list[int]]) -> Drawing:
    rows = [
        Row(str(layer), percent(found.agreement), bool(found.wrong), _cells(layer, found, counts(found)))
        for layer, found in routing.layers.items()
    ]
    title = f"{routing.modality} tokens by layer and expert, {side}"
    return heat_map((name, title, routing.description()), ("layer", "agree", "expert"), rows)


def _cells(layer: int, found: LayerRouting, counts: list[int]) -> list[Cell]:
    cells = []
    for expert, count in enumerate(counts):
        where = f"layer {layer}, expert {expert}"
        if not found.allowed[expert] and not count:
            cells.append(Cell(None, f"{where}: closed"))
            continue
        changed = found.reference[expert] != found.bundle[expert]
        share = count / found.tokens if found.tokens else 0.0
        cells.append(Cell(share, f"{where}: {count} of {found.tokens} tokens", changed))
    return cells


def _table(modality: str, document: Document) -> Markup:
    """Every routing number of a modality, a row for each case, phase and layer."""
    rows: list[list[Any]] = []
    experts = 0
    for phase, layer, name, found in document.routed():
        if name != modality or not found["tokens"]:
            continue
        experts = max(experts, len(found["reached"]))
        judged = [found[key] for key in ("tokens", "ties", "wrong", "first_wrong")]
        counts = [_both(*pair) for pair in zip(found["reached"], found["bundle_reached"], strict=True)]
        rows.append([phase.case, phase.name, layer, *judged, Share(found["agreement"]), *counts])
    columns = ["case", "phase", "layer", "tokens", "ties", "other experts", "first at", "agreement"]
    caption = f"{modality} tokens by expert; PyTorch \N{RIGHTWARDS ARROW} bundle where they differ"
    return table(caption, [*columns, *(f"expert {expert}" for expert in range(experts))], rows)


def _decisions(document: Document) -> Markup:
    phases = [phase for phase in document.phases if "decisions" in phase.data]
    rows = [[phase.case, phase.name, phase.data["decisions"], phase.data["ties"]] for phase in phases]
    return table("routing decisions in all layers", ["case", "phase", "decisions", "ties"], rows)


def _both(reference: int, bundle: int) -> Any:
    return reference if reference == bundle else f"{reference} \N{RIGHTWARDS ARROW} {bundle}"
