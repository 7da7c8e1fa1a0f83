"""What `moiie demo` shows: a picture, three questions about it, and where the experts sent their tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_recipes.demo.questions import KINDS, Question, ask
from moiie_recipes.demo.scenes import Scene, draw, make_scene

if TYPE_CHECKING:
    from moiie_runtime.routing import RoutingStats
    from moiie_runtime.vlm import VLM

QUESTIONS = 3


@dataclass(frozen=True)
class Answered:
    """A question, what the model said, and what is right."""

    question: str
    answer: str
    expected: str
    kind: str


@dataclass(frozen=True)
class Shown:
    """The picture's file, the questions with answers, and the routing of all of them together."""

    picture: Path
    answers: list[Answered]
    routing: RoutingStats


def show(vlm: VLM, directory: Path, seed: int) -> Shown:
    """Draw a held-out picture into `directory`, ask about it, and record the routing."""
    from moiie_runtime import Record

    scene, questions = _scene_with_questions(seed)
    picture = directory / "picture.png"
    draw(scene).save(picture)
    answers, routings = [], []
    for question in questions:
        message = {"role": "user", "content": [picture, question.text]}
        generation = vlm.generate([message], record=Record(routing=True))
        assert generation.routing is not None
        answers.append(Answered(question.text, generation.text, question.answer, question.kind))
        routings.append(generation.routing.stats())
    total = routings[0]
    for each in routings[1:]:
        total += each
    return Shown(picture, answers, total)


def _scene_with_questions(seed: int) -> tuple[Scene, list[Question]]:
    """A test scene of several things, and questions of three different kinds about it."""
    index = 0
    while True:
        scene = make_scene("test", seed, index)
        rng = random.Random(f"demo/{seed}/{index}")  # noqa: S311 (no secret)
        asked = [ask(scene, kind, rng) for kind in rng.sample(KINDS, len(KINDS))]
        questions = [question for question in asked if question is not None]
        if len(scene.things) >= 3 and len(questions) >= QUESTIONS:
            return scene, questions[:QUESTIONS]
        index += 1
