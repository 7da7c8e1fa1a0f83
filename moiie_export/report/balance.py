"""Load balance: how evenly a layer's tokens are spread over its experts, whatever their modality."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from moiie_export.report.document import Document
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import listed, percent
from moiie_export.report.routing import modality_routing
from moiie_export.report.section import Section
from moiie_export.report.svg import CHARACTER, WIDTH, Drawing, legend_lines
from moiie_export.report.table import figure, figures, table

COLOURS = 4
"""Fills `g0` to `g3` of the style sheet."""
_LEFT, _RIGHT, _ROW, _BAR = 34.0, 52.0, 26.0, 18.0


@dataclass(frozen=True)
class LoadBalance:
    """Assignments of tokens to experts, in the reference.

    Attributes:
        layers: layer -> tokens by expert, ascending.
        kinds: by expert, the modalities that may go there, for example `vision + language`; empty when closed to all.
        modalities: all there are, in the order of their colours.
    """

    layers: dict[int, list[int]]
    kinds: list[str]
    modalities: list[str]

    @property
    def groups(self) -> list[str]:
        """The different kinds, in the order of their first expert."""
        return [kind for kind in dict.fromkeys(self.kinds) if kind]

    def colour(self, kind: str) -> int:
        """The number of a kind's colour; that of its modality where it is for one alone, as in the other charts."""
        order = [*self.modalities, *(each for each in self.groups if each not in self.modalities)]
        return order.index(kind) % COLOURS

    def imbalance(self, layer: int) -> float:
        """Tokens of the busiest expert over the mean of the reachable ones; 1 is even."""
        counts = self.layers[layer]
        open_experts = sum(bool(kind) for kind in self.kinds)
        return max(counts) * open_experts / sum(counts) if sum(counts) else 1.0

    def idle(self, layer: int) -> list[int]:
        """Reachable experts that no token reached."""
        return [expert for expert, count in enumerate(self.layers[layer]) if self.kinds[expert] and not count]

    def description(self) -> str:
        """What there is to see, in words."""
        worst = max(self.layers, key=self.imbalance)
        idle = [f"expert {listed(idle)} in layer {layer}" for layer in self.layers if (idle := self.idle(layer))]
        reached = f"No token reached {'; '.join(idle)}." if idle else "Every reachable expert was reached."
        return (
            f"Least even is layer {worst}: its busiest expert has {self.imbalance(worst):.2f} times the mean. {reached}"
        )


def load_balance(document: Document) -> LoadBalance | None:
    """The load of each layer; None for a model without experts."""
    found = modality_routing(document)
    if not found:
        return None
    layers: dict[int, list[int]] = {}
    kinds: list[list[str]] = []
    for each in found:
        for layer, routed in each.layers.items():
            counts = layers.get(layer, [0] * len(routed.reference))
            layers[layer] = [a + b for a, b in zip(counts, routed.reference, strict=True)]
        allowed = next(iter(each.layers.values())).allowed
        kinds = kinds or [[] for _ in allowed]
        for expert, may in enumerate(allowed):
            kinds[expert] += [each.modality] * may
    modalities = [each.modality for each in found]
    return LoadBalance(dict(sorted(layers.items())), [" + ".join(names) for names in kinds], modalities)


def section(document: Document) -> Section | None:
    """The chart; None for a model without experts."""
    balance = load_balance(document)
    if balance is None:
        return None
    lead = tag(
        "p",
        "All tokens of all cases by expert, in PyTorch, expert 0 to the left. The number is how much busier the busiest "
        "expert is than the mean: 1.00 is perfectly even.",
        class_="lead",
    )
    worst = max(balance.layers, key=balance.imbalance)
    caption = [tag("strong", "busiest over mean"), f": at most {balance.imbalance(worst):.2f}, in layer {worst}"]
    drawn = figure(_draw(balance), join(caption), _table(balance))
    return Section("load", "Load balance", join([lead, figures([drawn])]), half=True)


def _draw(balance: LoadBalance) -> Drawing:
    legend = [("bar", f"group g{balance.colour(kind)}", f"{kind} experts") for kind in balance.groups]
    top = 16.0 * legend_lines(legend, _LEFT, WIDTH) + 24
    size = (WIDTH, top + _ROW * len(balance.layers) + 4)
    drawing = Drawing("load", "Share of all tokens by layer and expert", balance.description(), size)
    drawing.legend(legend, _LEFT, 8)
    drawing.text(_LEFT - 6, top - 10, "layer", "label", "end")
    drawing.text(WIDTH, top - 10, "busiest", "label", "end")
    for row, layer in enumerate(balance.layers):
        y = top + row * _ROW
        drawing.text(_LEFT - 6, y + _BAR / 2, str(layer), "label", "end")
        drawing.text(WIDTH, y + _BAR / 2, f"\N{MULTIPLICATION SIGN} {balance.imbalance(layer):.2f}", "label", "end")
        _draw_bar(drawing, balance, layer, y)
    return drawing


def _draw_bar(drawing: Drawing, balance: LoadBalance, layer: int, y: float) -> None:
    counts = balance.layers[layer]
    x, full = _LEFT, WIDTH - _LEFT - _RIGHT
    for expert, count in enumerate(counts):
        width = full * count / (sum(counts) or 1)
        group = balance.colour(balance.kinds[expert]) if balance.kinds[expert] else COLOURS - 1
        if count:
            note = f"layer {layer}, expert {expert}: {count} ({percent(count / sum(counts))})"
            drawing.rect((x, y), (max(width - min(1.0, width / 4), 0.1), _BAR), f"group g{group}", note)
        if width > CHARACTER * len(str(expert)) + 4:
            drawing.text(x + (width - 1) / 2, y + _BAR / 2, str(expert), f"on g{group}", "middle")
        x += width


def _table(balance: LoadBalance) -> Markup:
    experts = [f"expert {expert}" + (f" ({kind})" if kind else "") for expert, kind in enumerate(balance.kinds)]
    rows = [[layer, *counts, balance.imbalance(layer)] for layer, counts in balance.layers.items()]
    return table("tokens by layer and expert, in PyTorch", ["layer", *experts, "busiest over mean"], rows)
