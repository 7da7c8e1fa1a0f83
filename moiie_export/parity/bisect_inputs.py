"""Inputs for one run of a graph, the same at every call: what lies in the range of a real request, and in no real one."""

from __future__ import annotations

import numpy as np

from moiie_export.parity.metrics import Array
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.bundle import Bundle

_SIZES = {"images": 1, "sequence": 9, "kept": 1, "texts": 1, "words": 6, "patches": 12}
_ROWS = ("batch", "adapters")
_WHOLE = {"past_lengths": 0, "logits_to_keep": _SIZES["sequence"] - 1, "attention_mask": 1, "grid_size": 3}
PAST = 4
"""Tokens in the cache before a decode step."""


def made_up_inputs(bundle: Bundle, component: str, seed: int = 11, rows: int = 1) -> dict[str, Array]:
    """Arrays for every input of a component: a prompt of mixed modality, a token behind a filled cache, noise as a picture.

    Args:
        bundle: gives the inputs' names, types and shapes.
        component: one of its graphs.
        seed: others give other numbers.
        rows: prompts at once; a graph of fixed size has no other choice.
    """
    random = np.random.default_rng(seed)
    inputs = bundle.components[component].inputs
    past = PAST if component == "decoder_decode" else 0
    sizes = _SIZES | dict.fromkeys(_ROWS, rows)
    shapes = {
        name: tuple(dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in spec.shape)
        for name, spec in inputs.items()
    }
    return {name: _array(name, TensorSpec(spec.dtype, shapes[name]), random, past) for name, spec in inputs.items()}


def _array(name: str, spec: TensorSpec, random: np.random.Generator, past: int) -> Array:
    shape = tuple(int(size) for size in spec.shape)
    if name in _WHOLE:
        return np.full(shape, past if name == "past_lengths" else _WHOLE[name], spec.dtype)
    if name == "token_modality":  # vision rows lie together, between text
        rows = np.arange(shape[-1])
        return np.broadcast_to((rows > 1) & (rows < shape[-1] - 2), shape).astype(spec.dtype)
    if np.dtype(spec.dtype).kind in "iu":
        return random.integers(1, 20, shape).astype(spec.dtype)
    values = random.standard_normal(shape).astype(spec.dtype)
    if name == "flattened_patches":  # a patch begins with its row and its column
        values[..., 0], values[..., 1] = np.arange(shape[1]) // 3 + 1, np.arange(shape[1]) % 3 + 1
    if name.startswith("past_key_values."):
        values[:, :, past:] = 0
    return values
