"""Accuracy on held-out questions: of the bundle, of the PyTorch model, and of the model without one of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from moiie_export.demo.family import Asked, Case, DemoFamily
from moiie_export.demo.pytorch_answers import greedy_ids
from moiie_recipes.demo.questions import ONE_THING
from moiie_runtime.generate import Generation
from moiie_runtime.images import Picture
from moiie_runtime.prompt import Prompt
from moiie_runtime.vlm import VLM

NEW_TOKENS = 6
"""Enough for every answer of the sets with its end token; a longer one is wrong anyway."""
BATCH = 25


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, 0 to 1: over all, on questions about one thing, and by kind."""

    overall: float
    one_thing: float
    by_kind: Mapping[str, float]


@dataclass(frozen=True)
class Ablation:
    """Accuracy without a part of the model or of its input; `name` says which, for a table."""

    name: str
    accuracy: Accuracy


def score(family: DemoFamily, items: Sequence[Asked], answers: Sequence[str]) -> Accuracy:
    """How many answers are right, to the letter."""
    right = np.array([answer == item.question.answer for item, answer in zip(items, answers, strict=True)])
    kinds = np.array([item.question.kind for item in items])

    def share(of: Sequence[str]) -> float:
        chosen = right[np.isin(kinds, of)]
        return float(chosen.mean()) if len(chosen) else float("nan")

    return Accuracy(float(right.mean()), share(ONE_THING), {kind: share((kind,)) for kind in family.kinds})


def prompts_of(family: DemoFamily, vlm: VLM, items: Sequence[Asked]) -> list[Prompt]:
    """The bundle's own prompts for the questions and their pictures."""
    return [vlm.processor(conversation(family, item)) for item in items]


def conversation(family: DemoFamily, item: Asked) -> list[dict[str, object]]:
    """The question and its picture as messages."""
    return [{"role": "user", "content": [family.draw(item.scene), item.question.text]}]


def generations(family: DemoFamily, vlm: VLM, items: Sequence[Asked]) -> list[Generation]:
    """What the bundle answers, with what its instance router chose."""
    found: list[Generation] = []
    for start in range(0, len(items), BATCH):
        batch = [conversation(family, item) for item in items[start : start + BATCH]]
        found += vlm.generate_batch(batch, max_new_tokens=NEW_TOKENS)
    return found


def pytorch_answers(family: DemoFamily, model: Any, vlm: VLM, prompts: Sequence[Prompt]) -> list[str]:
    """What the PyTorch model answers to the same prompts."""
    ids = greedy_ids(family, model, vlm, prompts, NEW_TOKENS)
    return [vlm.processor.tokenizer.decode(row).strip() for row in ids]


def ablations(
    family: DemoFamily, model: Any, vlm: VLM, items: Sequence[Asked], prompts: list[Prompt]
) -> list[Ablation]:
    """Accuracy of the PyTorch model with each part taken away in turn; `prompts` are those of the items."""
    pictures = [
        Case("grey picture", _grey, nullcontext()),
        Case("picture of another question", _swapped, nullcontext()),
    ]
    found = []
    for case in [*pictures, *family.cases(model)]:
        with case.without:
            answers = pytorch_answers(family, model, vlm, case.change(prompts))
        found.append(Ablation(case.name, score(family, items, answers)))
    return found


def _grey(prompts: list[Prompt]) -> list[Prompt]:
    """Every picture replaced by the middle of the value range."""
    return [
        replace(
            prompt, pictures=tuple(Picture(Image.new("RGB", each.image.size, "#808080")) for each in prompt.pictures)
        )
        for prompt in prompts
    ]


def _swapped(prompts: list[Prompt]) -> list[Prompt]:
    """Every question with the picture of the next one."""
    pictures = [prompt.pictures for prompt in prompts]
    return [replace(p, pictures=other) for p, other in zip(prompts, pictures[1:] + pictures[:1], strict=True)]
