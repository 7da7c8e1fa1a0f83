"""What each vision expert contributed to questions of each kind, as in the paper's Figures 4 and 6 (spec mome.md, 1.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moiie_export.demo.family import Asked, DemoFamily
from moiie_runtime.generate import Generation
from moiie_runtime.vision_settings import Encoder


@dataclass(frozen=True)
class Shares:
    """Of one kind of questions.

    Attributes:
        contributions: expert -> its mean share of the mean absolute weighted features; they sum to 1.
        weights: expert -> the router's mean weight.
        adapters: layer by layer, the adapter that most questions took.
    """

    contributions: dict[str, float]
    weights: dict[str, float]
    adapters: list[int]


def shares_by_kind(
    family: DemoFamily, encoders: Sequence[Encoder], items: Sequence[Asked], answers: Sequence[Generation]
) -> dict[str, Shares]:
    """Kind -> what was chosen for its questions; empty for a model that chooses nothing by the question."""
    chosen: dict[str, list[Generation]] = {}
    for item, answer in zip(items, answers, strict=True):
        if answer.instance is not None:
            chosen.setdefault(item.question.kind, []).append(answer)
    return {kind: _shares(encoders, chosen[kind]) for kind in family.kinds if kind in chosen}


def _shares(encoders: Sequence[Encoder], answers: Sequence[Generation]) -> Shares:
    instances = [answer.instance for answer in answers if answer.instance is not None]
    contributions = np.mean([each.contributions for each in instances if each.contributions is not None], axis=0)
    weights = np.mean([each.move_weights for each in instances], axis=0)
    names = [encoder.name for encoder in encoders]
    adapters = [
        Counter(column.tolist()).most_common(1)[0][0] for column in np.stack([i.mole_index for i in instances]).T
    ]
    return Shares(
        {name: float(value) for name, value in zip(names, contributions, strict=True)},
        {name: float(value) for name, value in zip(names, weights, strict=True)},
        adapters,
    )
