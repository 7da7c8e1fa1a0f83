"""Stored weights against the checkpoint's, bit by bit: what no prompt reached is proven here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from moiie_export.parity.metrics import Array
from moiie_export.parity.report import Check, tell
from moiie_export.source import ModelSource
from moiie_export.weights import Weight
from moiie_export.weights_stage import WEIGHTS_FILE
from moiie_runtime.bundle import Bundle
from moiie_runtime.tensors import TensorFile


def check_embedding(bundle: Bundle, source: ModelSource) -> Check:
    """The host's embedding table, every row of it, against the checkpoint's."""
    weight = next(weight for weight in source.weight_map.weights if weight.name == "embed_tokens.weight")
    with TensorFile(bundle.path(bundle.embed_tokens.file)) as file:
        return tell("embedding", _differences(file, bundle.embed_tokens.tensor, weight, source, bundle.dtype))


def check_weights(bundle: Bundle, source: ModelSource) -> Check:
    """Every stored tensor, read once and in blocks."""
    with TensorFile(bundle.path(WEIGHTS_FILE)) as file:
        wanted = {weight.name for weight in source.weight_map.weights}
        lines = [f"{name} is not one of the checkpoint's" for name in file if name not in wanted]
        for weight in source.weight_map.weights:
            lines += _differences(file, weight.name, weight, source, bundle.dtype)
    match = re.search(r"layers\.(\d+)\.", next((line for line in lines if line.startswith("decoder.")), ""))
    layer = None if match is None else int(match[1])
    return tell("stored weights", lines, where="" if layer is None else f"layer {layer}", layer=layer)


def _differences(file: TensorFile, name: str, weight: Weight, source: ModelSource, dtype: str) -> Iterator[str]:
    if name not in file:
        yield f"{name} is missing"
        return
    stored = file[name]
    expected = np.dtype(np.float32 if weight.keep_float32 else dtype)
    if stored.dtype != expected or stored.shape != weight.shape:
        yield f"{name} is {stored.dtype} {list(stored.shape)}, expected {expected} {list(weight.shape)}"
        return
    flat, start, wrong, first = stored.reshape(-1), 0, 0, 0
    for block in source.blocks(weight):
        unequal = np.flatnonzero(_bits(flat[start : start + block.size]) != _bits(block.reshape(-1).astype(expected)))
        if len(unequal) and not wrong:
            first = start + int(unequal[0])
        wrong += len(unequal)
        start += block.size
    if wrong:
        row = first * weight.shape[0] // stored.size
        yield f"{name}: {wrong} of {stored.size} elements differ, the first in row {row}"


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint32 if values.dtype == np.float32 else np.uint16)
