"""Expert weights that are bound when an engine runs: one safetensors file, tensors named like the engine's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moiie_runtime.tensor_writer import TensorWriter

if TYPE_CHECKING:
    import onnx_ir as ir

    from moiie_export.graph.trt_context import Bank

FILE = "banks.safetensors"
_NAMES = {"FLOAT16": "F16", "BFLOAT16": "BF16", "FLOAT": "F32", "INT8": "I8", "FLOAT8E4M3FN": "F8_E4M3"}

Parts = Mapping[str, Sequence["ir.TensorProtocol"]]


def write_banks(path: Path, inputs: Mapping[str, tuple[str, tuple[int, ...]]], parts: Parts) -> None:
    """Write every bank, expert by expert; no bank is held whole.

    Args:
        path: the file.
        inputs: engine input -> ONNX name of its type, shape [n, ...].
        parts: engine input -> one tensor of the bundle an expert.
    """
    specs = {name: (_NAMES[dtype], shape) for name, (dtype, shape) in inputs.items()}
    with TensorWriter(path, specs) as writer:
        for name, (dtype, shape) in inputs.items():
            for tensor in parts[name]:
                writer.write_elements(_converted(tensor, dtype, math.prod(shape[1:])), name)


def describe_banks(banks: Sequence[Bank]) -> Iterator[dict[str, Any]]:
    """What engine.json says about banks: layer, name, experts, inputs."""
    for bank in banks:
        yield {"layer": bank.layer, "name": bank.name, "experts": list(bank.experts), "inputs": sorted(bank.tensors)}


def _converted(tensor: ir.TensorProtocol, dtype: str, count: int) -> np.ndarray[Any, Any]:
    from moiie_export.graph.trt_experts import stored_numbers

    numbers = stored_numbers(tensor).reshape(-1)
    assert len(numbers) == count
    if dtype == "BFLOAT16":
        import ml_dtypes

        return numbers.astype(ml_dtypes.bfloat16).view(np.uint16)
    if dtype == "FLOAT8E4M3FN":
        return numbers.view(np.uint8)
    return numbers.astype({"FLOAT16": np.float16, "FLOAT": np.float32, "INT8": np.int8}[dtype])
