"""Accuracy on held-out questions: of the bundle, of the PyTorch model, and of the model without one of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from moiie_export.demo.pytorch_answers import greedy_ids
from moiie_export.model.moe import Expert, MoeBlock, Routing
from moiie_export.model.vlm import VlmModel
from moiie_recipes.demo.held_out import Item
from moiie_recipes.demo.questions import KINDS, ONE_THING
from moiie_recipes.demo.scenes import draw
from moiie_runtime.prompt import LANGUAGE, VISION, Prompt

if TYPE_CHECKING:
    from moiie_runtime.vlm import VLM

NEW_TOKENS = 6
"""Enough for every answer of the set with its end token; a longer one is wrong anyway."""
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


def score(items: Sequence[Item], answers: Sequence[str]) -> Accuracy:
    """How many answers are right, to the letter."""
    right = np.array([answer == item.question.answer for item, answer in zip(items, answers, strict=True)])
    kinds = np.array([item.question.kind for item in items])

    def share(of: Sequence[str]) -> float:
        chosen = right[np.isin(kinds, of)]
        return float(chosen.mean()) if len(chosen) else float("nan")

    return Accuracy(float(right.mean()), share(ONE_THING), {kind: share((kind,)) for kind in KINDS})


def prompts_of(vlm: VLM, items: Sequence[Item]) -> list[Prompt]:
    """The bundle's own prompts for the questions and their pictures."""
    return [vlm.processor(conversation(item)) for item in items]


def conversation(item: Item) -> list[dict[str, object]]:
    """The question and its picture as messages."""
    return [{"role": "user", "content": [draw(item.scene), item.question.text]}]


def bundle_answers(vlm: VLM, items: Sequence[Item]) -> list[str]:
    """What the bundle answers."""
    answers: list[str] = []
    for start in range(0, len(items), BATCH):
        batch = [conversation(item) for item in items[start : start + BATCH]]
        answers += [each.text for each in vlm.generate_batch(batch, max_new_tokens=NEW_TOKENS)]
    return answers


def pytorch_answers(model: VlmModel, vlm: VLM, prompts: Sequence[Prompt]) -> list[str]:
    """What the PyTorch model answers to the same prompts."""
    ids = greedy_ids(model, prompts, NEW_TOKENS, vlm.bundle.tokens.eos)
    return [vlm.processor.tokenizer.decode(row).strip() for row in ids]


def ablations(model: VlmModel, vlm: VLM, items: Sequence[Item]) -> list[Ablation]:
    """Accuracy of the PyTorch model with each part taken away in turn."""
    prompts = prompts_of(vlm, items)
    cases: list[tuple[str, Callable[[list[Prompt]], list[Prompt]], AbstractContextManager[None]]] = [
        ("grey picture", _grey, nullcontext()),
        ("picture of another question", _swapped, nullcontext()),
        ("vision experts zeroed", list, _vision_experts_zeroed(model)),
        ("no expert for image tokens", list, _no_expert_for_images(model)),
        ("image tokens through the language gate", _as_language, nullcontext()),
    ]
    found = []
    for name, change, changed_model in cases:
        with changed_model:
            found.append(Ablation(name, score(items, pytorch_answers(model, vlm, change(prompts)))))
    return found


def _grey(prompts: list[Prompt]) -> list[Prompt]:
    """Every picture replaced by the middle of the value range."""
    return [replace(prompt, pixel_values=np.zeros_like(prompt.pixel_values)) for prompt in prompts]


def _swapped(prompts: list[Prompt]) -> list[Prompt]:
    """Every question with the picture of the next one."""
    pictures = [prompt.pixel_values for prompt in prompts]
    return [replace(p, pixel_values=other) for p, other in zip(prompts, pictures[1:] + pictures[:1], strict=True)]


def _as_language(prompts: list[Prompt]) -> list[Prompt]:
    """Image tokens routed as if they were text."""
    return [replace(p, token_modality=np.full_like(p.token_modality, LANGUAGE)) for p in prompts]


@contextmanager
def _vision_experts_zeroed(model: VlmModel) -> Iterator[None]:
    """While open, the experts that only image tokens may reach give nothing."""
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, MoeBlock):
            groups = layer.mlp.moe.expert_groups
            for expert in set(groups["vision"]) - set(groups["language"]):
                module = cast(Expert, layer.mlp.experts[str(expert)])
                weight = module.down_proj.data
                saved.append((weight, weight.clone()))
                weight.zero_()
    try:
        yield
    finally:
        for weight, values in saved:
            weight.copy_(values)


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
