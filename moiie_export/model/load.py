"""Fill the reference model, or one part of it, with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moiie_export.families import family_of
from moiie_export.source import Described, ModelSource
from moiie_export.weights import Weight

Reader = Callable[[Weight], Mapping[str, NDArray[np.float32]]]
"""Gives a weight's values by model parameter, as writable float32 arrays of the parameters' shapes."""


def empty_model(source: Described) -> nn.Module:
    """The model without weights, on the meta device: what is traced."""
    with torch.device("meta"):
        return family_of(source.config).model(source.config).eval()


def load_model(source: ModelSource, storage: str = "float32", read: Reader | None = None) -> Any:
    """The family's reference model in float32 with the checkpoint's weights.

    Args:
        source: the checkpoint.
        storage: "float16" rounds the weights as a float16 bundle stores them; arithmetic is float32 in any case.
        read: where the values come from instead.
    """
    model = empty_model(source)
    fill(model, source.weight_map.weights, read or checkpoint_reader(source, storage))
    return model


def fill(module: nn.Module, weights: Iterable[Weight], read: Reader, prefix: str = "") -> None:
    """Give a module all of its parameters, whose names in the model begin with `prefix`."""
    state = {
        name.removeprefix(prefix): torch.from_numpy(values)
        for weight in weights
        for name, values in read(weight).items()
    }
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def checkpoint_reader(source: ModelSource, storage: str = "float32") -> Reader:
    """The checkpoint's own values, rounded as a bundle of `storage` would hold them."""

    def read(weight: Weight) -> dict[str, NDArray[np.float32]]:
        values = source.tensor(weight)
        if storage != "float32" and not weight.keep_float32:
            values = values.astype(np.float16).astype(np.float32)
        return views(weight, values)

    return read


def views(weight: Weight, values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The parameters that a whole weight holds, without copying."""
    flat = values.reshape(-1)
    return {
        name: flat[start : start + int(np.prod(shape))].reshape(shape)
        for name, (start, shape) in weight.parameters().items()
    }
