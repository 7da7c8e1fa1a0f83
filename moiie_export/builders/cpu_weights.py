"""The weights file of a CPU engine: quantised weights in the kernels' form, others as they are, float16 as float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from moiie_export.graph.cpu_native import PackedWeight
from moiie_export.graph.cpu_passes import Lowered
from moiie_export.graph.rewriting import fixed_sizes
from moiie_export.quantize.packing import SCALES
from moiie_export.stages import Progress
from moiie_export.weights_file import WeightsFile
from moiie_runtime.cores import available_cores
from moiie_runtime.native_packing import pack_chunks, packed_bytes
from moiie_runtime.tensor_header import Specs

_PIECE = 1 << 22
"""Values that one step of the work holds at a time."""
_STORED = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F32",
    ir.DataType.INT8: "I8",
    ir.DataType.INT4: "I8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT64: "I64",
}


def weights_specs(lowered: Lowered) -> Specs:
    """What the file holds, name -> (dtype, shape): packed weights first, each beginning at a multiple of 64 bytes."""
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    scales: dict[str, tuple[str, tuple[int, ...]]] = {}
    for weight in lowered.packed.values():
        groups = weight.columns // weight.group_size
        if weight.paired is None:
            packed[weight.name] = ("U8", (weight.rows, groups, weight.group_size * weight.bits // 8))
            scales[weight.name + SCALES] = ("F32", (weight.rows, groups))
        else:
            size = packed_bytes(weight.rows, weight.columns, weight.bits, weight.group_size, weight.paired)
            packed[weight.name] = ("U8", (size,))
    plain = {name: (_STORED[tensor.dtype], _stored_shape(tensor)) for name, tensor in lowered.plain.items()}
    widest_first = sorted(plain, key=lambda name: plain[name][0] != "F32")
    return {**packed, **scales, **{name: plain[name] for name in widest_first}}


def write_engine_weights(lowered: Lowered, bundle_weights: Path, path: Path, progress: Progress) -> WeightsFile:
    """Write the file; memory stays at a few pieces, whatever its size.

    Returns:
        The finished file, whose header says where each tensor lies.
    """
    specs = weights_specs(lowered)
    source = np.memmap(bundle_weights, np.uint8, "r")
    steps = list(_steps(lowered))
    total, done = len(steps), 0
    with WeightsFile(path, specs, "", total, resume=False) as file, ThreadPoolExecutor(available_cores()) as pool:
        for _ in pool.map(lambda step: step.write(source, file), steps):
            done += 1
            progress("weights", done, total)
        file.commit(total, {})
        file.finish()
    path.with_name(path.name + ".journal").unlink()
    return file


@dataclass(frozen=True)
class _Packing:
    """A whole packed weight, piece by piece."""

    weight: PackedWeight

    def write(self, source: npt.NDArray[np.uint8], file: WeightsFile) -> None:
        weight, written = self.weight, 0
        values = _view(source, weight.values).view(np.int8).reshape(weight.rows, -1)
        scales = _view(source, weight.scales).view(np.float16).reshape(weight.rows, -1)
        for piece in pack_chunks(values, scales, weight.bits, bool(weight.paired)):
            file.write(weight.name, written, piece)
            written += piece.size


@dataclass(frozen=True)
class _Flipping:
    """A weight of MatMulNBits: unsigned values with a zero point in the middle, scales as float32."""

    weight: PackedWeight

    def write(self, source: npt.NDArray[np.uint8], file: WeightsFile) -> None:
        weight = self.weight
        values = _view(source, weight.values)
        sign = np.uint8(0x88 if weight.bits == 4 else 0x80)
        for start in range(0, values.size, _PIECE):
            file.write(weight.name, start, values[start : start + _PIECE] ^ sign)
        file.write(weight.name + SCALES, 0, _view(source, weight.scales).view(np.float16).astype(np.float32))


@dataclass(frozen=True)
class _Copying:
    """Elements [start, stop) of a weight that is stored as it was, or as float32."""

    name: str
    tensor: ir.ExternalTensor
    start: int
    stop: int

    def write(self, source: npt.NDArray[np.uint8], file: WeightsFile) -> None:
        half = self.tensor.dtype == ir.DataType.FLOAT16
        size = 2 if half else 4 if self.tensor.dtype == ir.DataType.FLOAT else 1
        part = _view(source, self.tensor)[self.start * size : self.stop * size]
        file.write(self.name, self.start, part.view(np.float16).astype(np.float32) if half else _as(part, size))


def _steps(lowered: Lowered) -> Iterator[_Packing | _Flipping | _Copying]:
    for weight in lowered.packed.values():
        yield _Flipping(weight) if weight.paired is None else _Packing(weight)
    for name, tensor in lowered.plain.items():
        elements = prod(_stored_shape(tensor))
        for start in range(0, elements, _PIECE):
            yield _Copying(name, tensor, start, min(elements, start + _PIECE))


def _view(source: npt.NDArray[np.uint8], tensor: ir.ExternalTensor) -> npt.NDArray[np.uint8]:
    offset, length = tensor.offset or 0, tensor.length or 0
    return source[offset : offset + length]


def _as(part: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.generic]:
    return part.view(np.float32) if size == 4 else part


def _stored_shape(tensor: ir.ExternalTensor) -> tuple[int, ...]:
    shape = fixed_sizes(tensor.shape)
    return (*shape[:-1], shape[-1] // 2) if tensor.dtype == ir.DataType.INT4 else shape
