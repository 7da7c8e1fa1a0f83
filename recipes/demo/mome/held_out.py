"""Held-out questions about lettered scenes."""

from __future__ import annotations

import random

from moiie_recipes.demo.held_out import Item, in_turn
from moiie_recipes.demo.mome.letters import LetteredScene, make_lettered
from moiie_recipes.demo.mome.questions import KINDS, sample
from moiie_recipes.demo.questions import Kind, Question


def held_out(count: int, seed: int = 0) -> list[Item]:
    """`count` questions of the test split, kinds in turn, each about a scene of its own; `seed` picks the set."""
    return in_turn((count, seed), KINDS, make_lettered, _question)


def _question(scene: LetteredScene, kind: Kind, rng: random.Random) -> Question | None:
    [question] = sample(scene, 1, rng, (kind,))
    return question if question.kind == kind else None
