"""How MoIIE looks at pictures before its decoder: one tower and projector, whose rows are used as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moiie_export.model.layerwise import Array, LayerByLayer, Watcher
from moiie_export.model.prompts import Asked, Look, encoders_of
from moiie_runtime.vision import encoder_inputs


@torch.inference_mode()
def look(parts: LayerByLayer, asked: Sequence[Asked], watcher: Watcher | None) -> list[Look]:
    """Features of every question's pictures, one picture at a time (spec moiie.md, 1.1 to 1.3)."""
    if not any(each.pictures for each in asked):
        return [Look(None) for _ in asked]
    [encoder] = encoders_of(parts.source)
    found: list[Look] = []
    with parts.loaded("vision_encoder", watcher) as module:
        for each in asked:
            rows: list[Array] = []
            for picture in each.pictures:
                pixels = encoder_inputs(encoder, picture)["pixel_values"]
                rows.append(module(torch.from_numpy(pixels))[0].numpy())
            found.append(Look(np.concatenate(rows) if rows else None))
    return found
