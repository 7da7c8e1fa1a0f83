"""The demo of MoME: three encoders that the question weighs, adapters that it chooses."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from moiie_export.demo.family import Case, DemoFamily, Inputs
from moiie_export.demo.pytorch_answers import embed
from moiie_export.demo.taking_away import zeroed
from moiie_export.model.mome.encoders import visual_tokens
from moiie_export.model.mome.model import MomeModel
from moiie_recipes.demo.mome.held_out import held_out
from moiie_recipes.demo.mome.letters import LetteredScene, draw_lettered, make_lettered
from moiie_recipes.demo.mome.questions import KINDS, sample
from moiie_recipes.demo.questions import Kind, Question
from moiie_runtime.prompt import Prompt
from moiie_runtime.vision import encoder_inputs
from moiie_runtime.vlm import VLM
from moiie_runtime.word_pieces import WordPieces


def _several(seed: int) -> tuple[LetteredScene, list[Question]]:
    """A test scene of several things, and three questions about it, each for another encoder."""
    kinds: tuple[Kind, ...] = ("colour", "shape", "letter")
    index = 0
    while True:
        scene = make_lettered("test", seed, index)
        rng = random.Random(f"demo/{seed}/{index}")  # noqa: S311 (no secret)
        questions = [question for kind in kinds for question in sample(scene, 1, rng, (kind,))]
        if len(scene.letters) >= 3 and tuple(question.kind for question in questions) == kinds:
            return scene, questions
        index += 1


def _inputs(model: MomeModel, vlm: VLM, prompts: Sequence[Prompt]) -> Inputs:
    settings = vlm.bundle.instance_router
    assert settings is not None, "a MoME bundle has one"
    pieces = WordPieces(vlm.bundle.path(settings.tokenizer), settings.max_length)
    ids, mask = pieces([prompt.instruction or "" for prompt in prompts])
    routing = model.router(torch.from_numpy(ids), torch.from_numpy(mask))
    rows = []
    for weights, prompt in zip(routing.move_weights, prompts, strict=True):
        features = [
            model.get_submodule(encoder.component)(
                *(torch.from_numpy(array) for array in encoder_inputs(encoder, prompt.pictures[0]).values())
            )[0]
            for encoder in prompt.encoders
        ]
        rows.append(visual_tokens(weights.unsqueeze(0), features, model.config.queries)[0])
    return Inputs(embed(model.embed_tokens, prompts, rows), None, model.mole.choose(routing.mole_index))


def _cases(model: MomeModel) -> list[Case]:
    experts = [
        Case(f"without {expert.name}", list, zeroed(model.get_submodule(f"{expert.component}.projector").parameters()))
        for expert in model.config.experts
    ]
    return [
        Case("every encoder with the same weight", list, zeroed(model.router.move.fc2.parameters())),
        *experts,
        Case("the first adapter for every question", list, zeroed(model.router.mole.fc2.parameters())),
        Case(
            "without adapters", list, zeroed(p for name, p in model.mole.named_parameters() if name.endswith("scale"))
        ),
    ]


MOME = DemoFamily(
    name="mome",
    recipe="demo-mome",
    folder="demo/mome/model",
    training="moiie_recipes.demo.mome.train",
    kinds=KINDS,
    held_out=held_out,
    draw=draw_lettered,
    several=_several,
    inputs=_inputs,
    cases=_cases,
)
