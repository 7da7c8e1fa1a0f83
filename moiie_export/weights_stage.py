"""Stage `weights`: every weight once, in one safetensors file, streamed in blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moiie_export.source import ModelSource
from moiie_export.stages import Progress
from moiie_export.weights import Weight
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorWriter

WEIGHTS_FILE = "onnx/weights.safetensors"
WEIGHTS_CODE = 1
"""Raised whenever this stage would write other bytes for the same checkpoint."""


def stored_dtype(weight: Weight, dtype: str) -> str:
    """Safetensors dtype of a weight in a bundle of `dtype`: vectors, gates and positions stay float32."""
    return "F32" if dtype == "float32" or weight.keep_float32 else "F16"


def specs(source: ModelSource, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) in file order; float32 first, so that every tensor is aligned to its item size."""
    ordered = sorted(source.weight_map.weights, key=lambda weight: stored_dtype(weight, dtype) != "F32")
    return {weight.name: (stored_dtype(weight, dtype), weight.shape) for weight in ordered}


def planned_bytes(source: ModelSource, dtype: str) -> int:
    """Bytes of weights a bundle will hold."""
    return sum((4 if kind == "F32" else 2) * prod(shape) for kind, shape in specs(source, dtype).values())


def write_weights(source: ModelSource, dtype: str, path: Path, progress: Progress) -> Mapping[str, Any]:
    """Stream all weights into `path`; memory stays at one block, whatever the checkpoint's size."""
    layout = specs(source, dtype)
    weights = {weight.name: weight for weight in source.weight_map.weights}
    temporary = path.with_name(path.name + ".tmp")
    total, done = planned_bytes(source, dtype), 0
    with TensorWriter(temporary, layout) as writer:
        for name, (kind, _) in layout.items():
            for block in source.blocks(weights[name]):
                stored = block if kind == "F32" else _to_float16(block, name)
                writer.write_elements(stored, name)
                done += stored.nbytes
                progress("weights", done, total)
    temporary.replace(path)
    return {}


def _to_float16(block: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        stored = block.astype(np.float16)
    if not np.isfinite(stored).all():
        worst = float(np.abs(block).max())
        raise MoiieError(f"{name}: {worst:g} does not fit float16 (at most 65504)", "export with --dtype float32")
    return stored
