"""How well the model answers held-out questions while it is trained."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer

from moiie_export.model.vlm import VlmModel
from moiie_recipes.demo.batches import SEGMENT, pack
from moiie_recipes.demo.differentiable import Layout
from moiie_recipes.demo.questions import KINDS, Question, ask
from moiie_recipes.demo.scenes import make_scene
from moiie_recipes.demo.stages import answer_logits


def teacher_forced_accuracy(model: VlmModel, tokenizer: Tokenizer, layout: Layout, count: int = 64) -> dict[str, float]:
    """Share of questions whose every answer token is the most probable one, over all and by kind."""
    questions = (len(layout.positions) - layout.image_tokens) // SEGMENT
    scenes = [make_scene("test", 1, index) for index in range(count)]
    asked: list[list[Question]] = []
    for index, scene in enumerate(scenes):
        rng = random.Random(f"test/{index}")  # noqa: S311
        row: list[Question] = []
        while len(row) < questions:
            question = ask(scene, KINDS[(index + len(row)) % len(KINDS)], rng) or ask(scene, "count", rng)
            row += [question] if question is not None else []
        asked.append(row)
    batch = pack(tokenizer, scenes, asked)
    with torch.no_grad():
        right = answer_logits(model, layout, batch, torch.bfloat16)[0].argmax(-1) == batch.labels[batch.labels >= 0]
    cells = torch.zeros_like(batch.labels, dtype=torch.bool)
    cells[batch.labels >= 0] = ~right
    wrong = cells.view(count, questions, SEGMENT).any(dim=2)
    kinds = [[question.kind for question in row] for row in asked]
    result = {"test": 1 - wrong.float().mean().item()}
    for kind in KINDS:
        of_kind = torch.tensor([[found == kind for found in row] for row in kinds])
        result[f"test_{kind}"] = 1 - wrong[of_kind].float().mean().item()
    return result
