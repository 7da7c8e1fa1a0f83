"""Held-out questions: equally many of each kind, about scenes that training never draws."""

from __future__ import annotations

import random
from dataclasses import dataclass

from moiie_recipes.demo.questions import KINDS, Question, ask
from moiie_recipes.demo.scenes import Scene, make_scene


@dataclass(frozen=True)
class Item:
    """A question about a scene."""

    scene: Scene
    question: Question


def held_out(count: int, seed: int = 0) -> list[Item]:
    """`count` questions of the test split, kinds in turn, each about a scene of its own; `seed` picks the set."""
    chosen: list[Item] = []
    index = 0
    while len(chosen) < count:
        scene = make_scene("test", seed, index)
        rng = random.Random(f"held-out/{seed}/{index}")  # noqa: S311
        question = ask(scene, KINDS[len(chosen) % len(KINDS)], rng)
        if question is not None:
            chosen.append(Item(scene, question))
        index += 1
    return chosen
