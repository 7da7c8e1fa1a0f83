"""Questions about a scene with answers of one or two words, spread so that the picture is needed to answer them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from moiie_recipes.demo.scenes import COLOURS, SHAPES, Scene, Thing

Kind = Literal["colour", "shape", "position", "count", "comparison", "caption", "letter"]

KINDS: tuple[Kind, ...] = ("colour", "shape", "position", "count", "comparison")
ONE_THING: tuple[Kind, ...] = ("colour", "shape", "position")
"""Kinds that ask about a single thing."""
CAPTION: Kind = "caption"
"""What training begins with besides questions: one of the things, its properties in any order. Never tested."""
NUMBERS = ("zero", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Question:
    """A question, the only right answer, and its kind."""

    kind: Kind
    text: str
    answer: str


def ask(scene: Scene, kind: Kind, rng: random.Random) -> Question | None:
    """A question of one kind; None when the scene has nothing to ask for.

    Answers are spread evenly: by symmetry for colour, shape and position, by choosing the answer before the question
    for counts, and by pairs that could as well be swapped for comparisons.
    """
    makers = {
        "caption": _caption,
        "colour": _colour,
        "shape": _shape,
        "position": _position,
        "count": _count,
        "comparison": _comparison,
    }
    found = makers[kind](scene, rng)
    return None if found is None else Question(kind, *found)


def ask_many(scene: Scene, count: int, rng: random.Random, kinds: tuple[Kind, ...] = KINDS) -> list[Question]:
    """`count` questions of random kinds; a scene without any question of these kinds is asked for counts instead."""
    able = [kind for kind in kinds if any(ask(scene, kind, rng) is not None for _ in range(4))] or ["count"]
    questions: list[Question] = []
    while len(questions) < count:
        question = ask(scene, rng.choice(able), rng)
        if question is not None:
            questions.append(question)
    return questions


def plural(word: str) -> str:
    """Several of them."""
    return f"{word}es" if word.endswith("ss") else f"{word}s"


def _alone(scene: Scene, attribute: str) -> list[Thing]:
    """Things whose shape or colour no other thing shares."""
    counts = Counter(getattr(thing, attribute) for thing in scene.things)
    return [thing for thing in scene.things if counts[getattr(thing, attribute)] == 1]


def _names(scene: Scene) -> Iterator[tuple[Thing, str]]:
    """Every way to name exactly one thing of the scene."""
    pairs = Counter((thing.colour, thing.shape) for thing in scene.things)
    for thing in _alone(scene, "shape"):
        yield thing, f"the {thing.shape}"
    for thing in _alone(scene, "colour"):
        yield thing, f"the {thing.colour} thing"
    for thing in scene.things:
        if pairs[thing.colour, thing.shape] == 1:
            yield thing, f"the {thing.colour} {thing.shape}"


def _caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    return "What things are there?", " ".join(rng.sample((thing.colour, thing.shape, thing.place), 3))


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    things = _alone(scene, "shape")
    if not things:
        return None
    thing = rng.choice(things)
    return f"What colour is the {thing.shape}?", thing.colour


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    things = _alone(scene, "colour")
    if not things:
        return None
    thing = rng.choice(things)
    return f"What shape is the {thing.colour} thing?", thing.shape


def _position(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    names = list(_names(scene))
    if not names:
        return None
    thing, name = rng.choice(names)
    return f"Where is {name}?", thing.place


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.2:
        return "How many things are there?", NUMBERS[len(scene.things)]
    by_number: dict[int, list[str]] = {}
    for attribute, values in (("shape", SHAPES), ("colour", tuple(COLOURS))):
        counts = Counter(getattr(thing, attribute) for thing in scene.things)
        for value in values:
            things = plural(value) if attribute == "shape" else f"{value} things"
            by_number.setdefault(counts[value], []).append(things)
    number = rng.choice(sorted(by_number))
    return f"How many {rng.choice(by_number[number])} are there?", NUMBERS[number]


def _comparison(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    answer = rng.choice(("yes", "no"))
    if rng.random() < 0.3 and (same := _same_colour(scene, answer)):
        return rng.choice(same), answer
    axis, word = rng.choice((("column", "left of"), ("row", "above")))
    names = list(_names(scene))
    questions = [
        f"Is {name} {word} {other_name}?"
        for (thing, name), (other, other_name) in permutations(names, 2)
        if getattr(thing, axis) != getattr(other, axis)
        and (getattr(thing, axis) < getattr(other, axis)) == (answer == "yes")
    ]
    return (rng.choice(questions), answer) if questions else None


def _same_colour(scene: Scene, answer: str) -> list[str]:
    """Questions with this answer; none unless the scene has questions with either answer, which would tell it."""
    pairs = list(permutations(_alone(scene, "shape"), 2))
    found: dict[str, list[str]] = {"yes": [], "no": []}
    for one, other in pairs:
        text = f"Are the {one.shape} and the {other.shape} the same colour?"
        found["yes" if one.colour == other.colour else "no"].append(text)
    return found[answer] if all(found.values()) else []
