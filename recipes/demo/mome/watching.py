"""How well the model answers held-out questions while it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moiie_export.model.mome.model import MomeModel
from moiie_recipes.demo.mome.batches import SEGMENT, ask_batch, pack
from moiie_recipes.demo.mome.letters import LetteredScene, make_lettered
from moiie_recipes.demo.mome.pictures import inputs_of
from moiie_recipes.demo.mome.pretraining import tower_features
from moiie_recipes.demo.mome.questions import KINDS

if TYPE_CHECKING:
    from moiie_recipes.demo.mome.stages import QuestionStage

_SCENES = 60


def _scenes() -> list[LetteredScene]:
    return [make_lettered("test", 1, index) for index in range(_SCENES)]


def held_out_features(model: MomeModel) -> dict[str, torch.Tensor]:
    """Expert -> its tower's features of the held-out scenes."""
    inputs = [inputs_of(model.config, scene) for scene in _scenes()]
    return tower_features(model, {name: np.stack([each[name] for each in inputs]) for name in inputs[0]})


@torch.no_grad()
def teacher_forced_accuracy(stage: QuestionStage) -> dict[str, float]:
    """Share of questions whose every answer token is the most probable one, over all and by kind."""
    from moiie_recipes.demo.mome.stages import answer

    most, scenes = stage.settings.questions_per_row, _scenes()
    towers = {name: values.float() for name, values in stage.held_out_features.items()}
    result: dict[str, float] = {}
    for kind in KINDS:
        asked = ask_batch(scenes, most, "watching", (kind,))
        batch = pack(stage.tokenizers, asked, most)
        found = answer(stage.model, stage.layout, batch, towers, stage.adapters, torch.bfloat16)
        wrong = torch.zeros_like(batch.labels, dtype=torch.bool)
        wrong[batch.labels >= 0] = found.logits.argmax(-1) != batch.labels[batch.labels >= 0]
        missed = wrong.unflatten(1, (most, SEGMENT)).any(dim=2)
        there = (batch.labels >= 0).unflatten(1, (most, SEGMENT)).any(dim=2)
        result[f"test_{kind}"] = 1 - missed[there].float().mean().item()
        result |= {
            f"{kind}_{e.name}": found.weights[:, i].mean().item() for i, e in enumerate(stage.model.config.experts)
        }
    return {"test": sum(result[f"test_{kind}"] for kind in KINDS) / len(KINDS), **result}
