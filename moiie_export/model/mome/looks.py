"""How MoME looks at pictures before its decoder: the instruction weighs three encoders and chooses the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moiie_export.families.mome import SENTENCE_TOKENIZER
from moiie_export.model.layerwise import LayerByLayer, Watcher
from moiie_export.model.mome.encoders import visual_tokens
from moiie_export.model.prompts import Asked, Look, encoders_of
from moiie_export.mome_config import MomeConfig
from moiie_runtime.vision import encoder_inputs
from moiie_runtime.word_pieces import WordPieces


@torch.inference_mode()
def look(parts: LayerByLayer, asked: Sequence[Asked], watcher: Watcher | None) -> list[Look]:
    """Weighted rows of every question's pictures, and its adapters (spec mome.md, 1.2 and 1.3)."""
    config = parts.source.config
    assert isinstance(config, MomeConfig)
    pieces = WordPieces(parts.source.checkpoint.path / SENTENCE_TOKENIZER, config.sentence.max_length)
    with parts.loaded("router") as router:
        routed = [router(*(torch.from_numpy(ids) for ids in pieces([each.instruction]))) for each in asked]
    features: list[list[torch.Tensor]] = [[] for _ in asked]
    for encoder in encoders_of(parts.source):
        if not any(each.pictures for each in asked):
            break
        with parts.loaded(encoder.component, watcher) as module:
            for number, each in enumerate(asked):
                inputs = [encoder_inputs(encoder, picture) for picture in each.pictures]
                rows = [
                    module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in one.values()))[0]
                    for one in inputs
                ]
                features[number] += [torch.cat(rows)] if rows else []
    looks = []
    for own, experts, each in zip(routed, features, asked, strict=True):
        weights = own.move_weights.expand(len(each.pictures), -1)
        rows_ = visual_tokens(weights, experts, config.queries).numpy() if experts else None
        looks.append(Look(rows_, own.mole_index[0].numpy()))
    return looks
