"""Questions about lettered scenes, by topic: what is asked for, and by what the thing is named.

The topic is what the instruction router can go by: "Which letter is in the top left?" needs the glyphs alone, "Which
letter is on the red thing?" colours too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache

from moiie_recipes.demo.mome.letters import LetteredScene
from moiie_recipes.demo.questions import NUMBERS, Kind, Question, plural
from moiie_recipes.demo.scenes import COLOURS, SHAPES, Thing

KINDS: tuple[Kind, ...] = ("colour", "shape", "position", "count", "letter")
TOPICS: dict[Kind, tuple[str, ...]] = {
    "colour": ("place", "shape"),
    "shape": ("place", "colour"),
    "position": ("colour", "shape", "both"),
    "count": ("colour", "shape", "all"),
    "letter": ("place", "colour", "shape", "both"),
}
"""Kind -> by what it names things."""
Topic = tuple[Kind, str]
ALL_TOPICS: tuple[Topic, ...] = tuple((kind, way) for kind in KINDS for way in TOPICS[kind])


@cache
def questions_of(lettered: LetteredScene) -> dict[Topic, tuple[Question, ...]]:
    """Every question of every topic that has some."""
    found: dict[Topic, list[Question]] = {}
    for topic, question in [*_about_things(lettered), *_counts(lettered)]:
        found.setdefault(topic, []).append(question)
    return {topic: tuple(questions) for topic, questions in found.items()}


def sample(lettered: LetteredScene, count: int, rng: random.Random, kinds: tuple[Kind, ...] = KINDS) -> list[Question]:
    """Up to `count` different questions of one topic, which is drawn by kind first and then evenly within it.

    Counts have different answers, so that zero is no likelier than another number.
    """
    found = questions_of(lettered)
    able = [kind for kind in kinds if any((kind, way) in found for way in TOPICS[kind])] or ["count"]
    kind = rng.choice(able)
    questions = found[rng.choice([(kind, way) for way in TOPICS[kind] if (kind, way) in found])]
    if kind != "count":
        return rng.sample(questions, min(count, len(questions)))
    by_number: dict[str, list[Question]] = {}
    for question in questions:
        by_number.setdefault(question.answer, []).append(question)
    numbers = rng.sample(sorted(by_number), min(count, len(by_number)))
    return [rng.choice(by_number[number]) for number in numbers]


def _about_things(lettered: LetteredScene) -> Iterator[tuple[Topic, Question]]:
    things = [thing for thing, _ in lettered.things]
    for thing, letter in lettered.things:
        for way, name in _names(thing, things):
            named = f"the {name}" if way != "place" else f"the thing in the {name}"
            if way not in ("colour", "both"):
                yield ("colour", way), Question("colour", f"What colour is {named}?", thing.colour)
            if way not in ("shape", "both"):
                yield ("shape", way), Question("shape", f"What shape is {named}?", thing.shape)
            if way != "place":
                yield ("position", way), Question("position", f"Where is {named}?", thing.place)
            if letter is not None:
                where = f"in the {name}" if way == "place" else f"on {named}"
                yield ("letter", way), Question("letter", f"Which letter is {where}?", letter)


def _names(thing: Thing, things: list[Thing]) -> Iterator[tuple[str, str]]:
    """The ways that name this thing and no other, with the name."""
    yield "place", thing.place
    if Counter(each.colour for each in things)[thing.colour] == 1:
        yield "colour", f"{thing.colour} thing"
    if Counter(each.shape for each in things)[thing.shape] == 1:
        yield "shape", thing.shape
    if Counter((each.colour, each.shape) for each in things)[thing.colour, thing.shape] == 1:
        yield "both", f"{thing.colour} {thing.shape}"


def _counts(lettered: LetteredScene) -> Iterator[tuple[Topic, Question]]:
    things = [thing for thing, _ in lettered.things]
    shapes, colours = Counter(each.shape for each in things), Counter(each.colour for each in things)
    names = [("all", "things", len(things))]
    names += [("shape", plural(shape), shapes[shape]) for shape in SHAPES]
    names += [("colour", f"{colour} things", colours[colour]) for colour in COLOURS]
    for way, name, number in names:
        yield ("count", way), Question("count", f"How many {name} are there?", NUMBERS[number])
