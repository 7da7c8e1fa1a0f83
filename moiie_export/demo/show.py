"""What `moiie demo` shows: a picture, three questions about it, and how they were routed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_export.demo.family import DemoFamily

if TYPE_CHECKING:
    from moiie_runtime.routing import RoutingStats
    from moiie_runtime.vlm import VLM

PICTURE = "picture.png"


@dataclass(frozen=True)
class Answered:
    """A question, what the model said, and what is right.

    `instance` is what the question chose, where the model has an instance router: `move_weights` and `contributions` by
    encoder, and `mole_index` by layer.
    """

    question: str
    answer: str
    expected: str
    kind: str
    instance: dict[str, Any] | None = None


@dataclass(frozen=True)
class Shown:
    """The picture's file, the questions with answers, and, where tokens are routed, the routing of all of them together."""

    picture: Path
    answers: list[Answered]
    routing: RoutingStats | None


def show(family: DemoFamily, vlm: VLM, directory: Path, seed: int) -> Shown:
    """Draw a held-out picture into `directory`, ask about it, and record the routing."""
    from moiie_runtime import Record

    scene, questions = family.several(seed)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / PICTURE
    family.draw(scene).save(picture)
    record = Record(routing=vlm.bundle.model.moe is not None)
    answers, total = [], None
    for question in questions:
        message = {"role": "user", "content": [picture, question.text]}
        generation = vlm.generate([message], record=record)
        if generation.routing is not None:
            stats = generation.routing.stats()
            total = stats if total is None else total + stats
        instance = _instance(vlm, generation.instance)
        answers.append(Answered(question.text, generation.text, question.answer, question.kind, instance))
    return Shown(picture, answers, total)


def _instance(vlm: VLM, instance: Any) -> dict[str, Any] | None:
    if instance is None:
        return None
    names, layers = [encoder.name for encoder in vlm.bundle.encoders], vlm.bundle.adapters
    return {
        "move_weights": dict(zip(names, instance.move_weights.tolist(), strict=True)),
        "contributions": dict(zip(names, instance.contributions.tolist(), strict=True)),
        "mole_index": dict(zip(map(str, layers.layers if layers else ()), instance.mole_index.tolist(), strict=True)),
    }
