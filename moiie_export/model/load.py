"""Fill the reference model with a checkpoint's weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from moiie_export.families import family_of
from moiie_export.source import ModelSource
from moiie_export.weights import Weight


def empty_model(source: ModelSource) -> nn.Module:
    """The model without weights, on the meta device: what is traced."""
    with torch.device("meta"):
        return family_of(source.config).model(source.config).eval()


def load_model(source: ModelSource, storage: str = "float32") -> Any:
    """The family's reference model in float32 with the checkpoint's weights.

    Args:
        source: the checkpoint.
        storage: "float16" rounds the weights as a float16 bundle stores them; arithmetic is float32 in any case.
    """
    model = empty_model(source)
    state: dict[str, torch.Tensor] = {}
    for weight in source.weight_map.weights:
        stacked = torch.from_numpy(_stored(source, weight, storage)).reshape(-1)
        for name, (start, shape) in weight.parameters().items():
            state[name] = stacked[start : start + int(np.prod(shape))].view(shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False)


def _stored(source: ModelSource, weight: Weight, storage: str) -> np.ndarray:
    values = source.tensor(weight)
    return values if storage == "float32" or weight.keep_float32 else values.astype(np.float16).astype(np.float32)
