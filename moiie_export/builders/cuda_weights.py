"""The weights file of an engine for ONNX Runtime on CUDA: converted, stacked or with flipped signs, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from moiie_export.graph.cpu_native import PackedWeight
from moiie_export.graph.cuda_experts import Stack
from moiie_export.graph.cuda_passes import CudaWeights
from moiie_export.graph.rewriting import fixed_sizes
from moiie_export.quantize.packing import SCALES
from moiie_export.stages import Progress
from moiie_runtime.tensor_header import NUMPY_DTYPES, Specs, TensorInfo
from moiie_runtime.tensor_writer import TensorWriter

_PIECE = 1 << 24
"""Values that are held at a time, about."""
_STORED = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.INT64: "I64", ir.DataType.INT8: "I8"}

Pieces = Iterator[npt.NDArray[np.generic]]
_Made = tuple[str, tuple[int, ...], Callable[[npt.NDArray[np.uint8]], Pieces]]
"""safetensors dtype, shape, and what makes its pieces from the bundle's file."""


def weights_specs(weights: CudaWeights) -> Specs:
    """What the file holds, name -> (dtype, shape), the widest types first."""
    return {name: made[:2] for name, made in _all(weights).items()}


def write_engine_weights(
    weights: CudaWeights, bundle_weights: Path, path: Path, progress: Progress
) -> dict[str, TensorInfo]:
    """Write the file; returns where each tensor lies."""
    source = np.memmap(bundle_weights, np.uint8, "r")
    made = _all(weights)
    with TensorWriter(path, weights_specs(weights)) as writer:
        for done, (name, (_, _, pieces)) in enumerate(made.items()):
            progress("weights", done, len(made))
            for piece in pieces(source):
                writer.write_elements(piece, name)
    progress("weights", len(made), len(made))
    return dict(writer.header)


def _all(weights: CudaWeights) -> dict[str, _Made]:
    made: dict[str, _Made] = {}
    for name, plain in weights.plain.items():
        shape = fixed_sizes(plain.tensor.shape)
        made[name] = (_STORED[plain.dtype], shape, _converting(plain.tensor, plain.dtype))
    for stack in weights.stacks.values():
        made[stack.name] = (_STORED[stack.dtype], stack.shape, _stacking(stack))
    for packed in weights.packed.values():
        groups = packed.columns // packed.group_size
        block = packed.group_size * packed.bits // 8
        made[packed.name] = ("U8", (packed.rows, groups, block), _flipping(packed))
        made[packed.name + SCALES] = (
            _STORED[weights.scales],
            (packed.rows, groups),
            _converting(packed.scales, weights.scales),
        )
    return dict(sorted(made.items(), key=lambda item: -NUMPY_DTYPES[item[1][0]].itemsize))


def _converting(tensor: ir.ExternalTensor, dtype: ir.DataType) -> Callable[[npt.NDArray[np.uint8]], Pieces]:
    def pieces(source: npt.NDArray[np.uint8]) -> Pieces:
        values = _values(source, tensor)
        for start in range(0, values.size, _PIECE):
            yield _rounded(values[start : start + _PIECE], dtype)

    return pieces


def _stacking(stack: Stack) -> Callable[[npt.NDArray[np.uint8]], Pieces]:
    rows, columns = stack.shape[1:]
    step = max(1, _PIECE // columns)

    def pieces(source: npt.NDArray[np.uint8]) -> Pieces:
        for part in stack.parts:
            values = _values(source, part).reshape(rows, columns)
            if not stack.paired:
                for start in range(0, rows, step):
                    yield _rounded(values[start : start + step], stack.dtype)
                continue
            gate, up = values[: rows // 2], values[rows // 2 :]
            for start in range(0, rows // 2, step):
                both = np.stack((gate[start : start + step], up[start : start + step]), axis=1)
                yield _rounded(both.reshape(-1, columns), stack.dtype)

    return pieces


def _flipping(weight: PackedWeight) -> Callable[[npt.NDArray[np.uint8]], Pieces]:
    """Signed numbers as MatMulNBits reads them: unsigned, with the zero point in the middle."""
    sign = np.uint8(0x88 if weight.bits == 4 else 0x80)

    def pieces(source: npt.NDArray[np.uint8]) -> Pieces:
        values = _bytes(source, weight.values)
        for start in range(0, values.size, _PIECE):
            yield values[start : start + _PIECE] ^ sign

    return pieces


def _bytes(source: npt.NDArray[np.uint8], tensor: ir.ExternalTensor) -> npt.NDArray[np.uint8]:
    offset, length = tensor.offset or 0, tensor.length or 0
    return source[offset : offset + length]


def _values(source: npt.NDArray[np.uint8], tensor: ir.ExternalTensor) -> npt.NDArray[np.generic]:
    values = _bytes(source, tensor).view(tensor.dtype.numpy())
    assert values.size == prod(fixed_sizes(tensor.shape))
    return values


def _rounded(values: npt.NDArray[np.generic], dtype: ir.DataType) -> npt.NDArray[np.generic]:
    """In another type; what float16 cannot hold becomes infinite, as it would on the GPU."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(dtype.numpy(), copy=False))
