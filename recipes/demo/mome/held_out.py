"""Held-out questions about lettered scenes: equally many of each kind, about scenes that training never draws."""

from __future__ import annotations

import random
from dataclasses import dataclass

from moiie_recipes.demo.mome.letters import LetteredScene, make_lettered
from moiie_recipes.demo.mome.questions import KINDS, sample
from moiie_recipes.demo.questions import Question


@dataclass(frozen=True)
class Item:
    """A question about a scene."""

    scene: LetteredScene
    question: Question


def held_out(count: int, seed: int = 0) -> list[Item]:
    """`count` questions of the test split, kinds in turn, each about a scene of its own; `seed` picks the set."""
    chosen: list[Item] = []
    index = 0
    while len(chosen) < count:
        scene, kind = make_lettered("test", seed, index), KINDS[len(chosen) % len(KINDS)]
        [question] = sample(scene, 1, random.Random(f"held-out/{seed}/{index}"), (kind,))  # noqa: S311
        if question.kind == kind:
            chosen.append(Item(scene, question))
        index += 1
    return chosen
