"""The demo of MoIIE: one encoder, experts reached by modality."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from moiie_export.demo.family import Case, DemoFamily, Inputs
from moiie_export.demo.pytorch_answers import embed
from moiie_export.demo.taking_away import zeroed
from moiie_export.model.moe import Expert, MoeBlock, Routing
from moiie_export.model.vlm import VlmModel
from moiie_recipes.demo.held_out import held_out
from moiie_recipes.demo.questions import KINDS, Question, ask
from moiie_recipes.demo.scenes import Scene, draw, make_scene
from moiie_runtime.prompt import LANGUAGE, VISION, Prompt
from moiie_runtime.vlm import VLM

QUESTIONS = 3


def _several(seed: int) -> tuple[Scene, list[Question]]:
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


def _inputs(model: VlmModel, _: VLM, prompts: Sequence[Prompt]) -> Inputs:
    pixels = np.concatenate([prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None])
    features, _ = model.vision_encoder(torch.from_numpy(pixels))
    embeds = embed(model.embed_tokens, prompts, list(features))
    modality = torch.zeros(embeds.shape[:2], dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        modality[row, : prompt.length] = torch.from_numpy(prompt.token_modality)
    return Inputs(embeds, modality)


def _cases(model: VlmModel) -> list[Case]:
    return [
        Case("vision experts zeroed", list, zeroed(_vision_experts(model))),
        Case("no expert for image tokens", list, _no_expert_for_images(model)),
        Case("image tokens through the language gate", _as_language, nullcontext()),
    ]


def _as_language(prompts: list[Prompt]) -> list[Prompt]:
    """Image tokens routed as if they were text."""
    return [replace(p, token_modality=np.full_like(p.token_modality, LANGUAGE)) for p in prompts]


def _vision_experts(model: VlmModel) -> Iterator[torch.Tensor]:
    """What the experts that only image tokens may reach give their results through."""
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, MoeBlock):
            groups = layer.mlp.moe.expert_groups
            for expert in set(groups["vision"]) - set(groups["language"]):
                yield cast(Expert, layer.mlp.experts[str(expert)]).down_proj


@contextmanager
def _no_expert_for_images(model: VlmModel) -> Iterator[None]:
    """While open, image tokens get nothing from any expert, shared ones included; text is served as ever."""
    blocks = [layer.mlp for layer in model.decoder.layers if isinstance(layer.mlp, MoeBlock)]

    def silence(block: MoeBlock) -> None:
        def route(x: torch.Tensor, token_modality: torch.Tensor | None) -> Routing:
            found = MoeBlock.route(block, x, token_modality)
            if token_modality is None:
                return found
            heard = (token_modality != VISION).unsqueeze(1)
            return replace(found, expert_weights=found.expert_weights * heard)

        block.__dict__["route"] = route

    try:
        for block in blocks:
            silence(block)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("route", None)


MOIIE = DemoFamily(
    name="moiie",
    recipe="demo",
    folder="demo/model",
    training="moiie_recipes.demo.train",
    kinds=KINDS,
    held_out=held_out,
    draw=draw,
    several=_several,
    inputs=_inputs,
    cases=_cases,
)
