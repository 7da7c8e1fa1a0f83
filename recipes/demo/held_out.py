"""Held-out questions: equally many of each kind, about scenes that training never draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moiie_recipes.demo.questions import KINDS, Kind, Question, ask
from moiie_recipes.demo.scenes import make_scene


@dataclass(frozen=True)
class Item:
    """A question about a scene; what a scene is, only what made and draws it knows."""

    scene: Any
    question: Question


def held_out(count: int, seed: int = 0) -> list[Item]:
    """`count` questions of the test split, kinds in turn, each about a scene of its own; `seed` picks the set."""
    return in_turn((count, seed), KINDS, make_scene, ask)


def in_turn(
    wanted: tuple[int, int],
    kinds: Sequence[Kind],
    make: Callable[..., Any],
    question_of: Callable[[Any, Kind, random.Random], Question | None],
) -> list[Item]:
    """Questions about test scenes, kinds in turn.

    Args:
        wanted: how many, and the seed that picks the set.
        kinds: in their order.
        make: (split, seed, index) -> scene.
        question_of: a question of the kind about the scene; None when it has none to ask, and the next scene is taken.
    """
    (count, seed), chosen, index = wanted, list[Item](), 0
    while len(chosen) < count:
        scene = make("test", seed, index)
        rng = random.Random(f"held-out/{seed}/{index}")  # noqa: S311
        question = question_of(scene, kinds[len(chosen) % len(kinds)], rng)
        if question is not None:
            chosen.append(Item(scene, question))
        index += 1
    return chosen
