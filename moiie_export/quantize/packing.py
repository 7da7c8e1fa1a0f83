"""How quantised weights lie in a bundle: two 4-bit values a byte, scales beside them, and back to float32.

Shapes: a weight [..., N, K] with groups of g columns.
    int4   NAME int8 [..., N, K/2], low nibble = even column;   NAME.scales float16 [..., N, K/g]
    int8   NAME int8 [..., N, K];                               NAME.scales float16 [..., N, K/g]
    fp8    NAME float8 E4M3 [..., N, K] (bits as uint8);        NAME.scales float32 [..., N]
    w8a8   NAME int8 [..., N, K];  NAME.scales float32 [..., N];  NAME.input_scale float32 [1]
A value is the stored number times its scale, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moiie_export.quantize.scheme import Scheme
from moiie_runtime.errors import MoiieError

Array = npt.NDArray[Any]
Int8 = npt.NDArray[np.int8]
Float32 = npt.NDArray[np.float32]

SCALES, INPUT_SCALE = ".scales", ".input_scale"
"""What is added to a weight's name for the tensors beside it."""


@dataclass(frozen=True)
class Quantized:
    """A quantised weight, or a block of its rows.

    Attributes:
        values: int8 [N, K], one stored number each, not packed; for fp8 the bits of the E4M3 numbers.
        scales: float16 [N, K/g], or float32 [N] for the formats with a scale per row.
        input_scale: float32, of the activations (w8a8 only).
        method: what made it; differs from the method asked for where that fell back.
        note: why it fell back, or "".
    """

    values: Int8
    scales: Array
    input_scale: np.float32 | None = None
    method: str = "rtn"
    note: str = ""


def pack_int4(values: Int8) -> Int8:
    """Two signed 4-bit values a byte: int8 [..., K] in -8..7 -> int8 [..., K/2], the even column in the low nibble.

    Raises:
        MoiieError: K is odd.
    """
    if values.shape[-1] % 2:
        raise MoiieError(f"int4 values are stored in pairs: expected an even row length, found {values.shape[-1]}")
    pairs = np.ascontiguousarray(values).view("<i2")  # the even column is the low byte
    packed = pairs >> 4
    packed &= 0xF0
    packed |= pairs & 0x0F
    return packed.astype(np.int8)


def unpack_int4(packed: Int8) -> Int8:
    """The inverse of `pack_int4`: int8 [..., K/2] -> int8 [..., K] in -8..7."""
    values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    np.right_shift(packed << 4, 4, out=values[..., ::2])
    np.right_shift(packed, 4, out=values[..., 1::2])
    return values


def stored_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a quantised weight: suffix of its name -> (safetensors dtype, shape).

    Args:
        shape: of the weight, [..., N, K]; `Scheme.check_row` has accepted K.
        scheme: its form.
    """
    rows, columns = shape[:-1], shape[-1]
    if scheme.grouped:
        width = columns // 2 if scheme.bits == 4 else columns
        return {"": ("I8", (*rows, width)), SCALES: ("F16", (*rows, scheme.groups(columns)))}
    kinds = {"": ("F8_E4M3" if scheme.format == "fp8" else "I8", shape), SCALES: ("F32", rows)}
    return kinds | ({INPUT_SCALE: ("F32", (1,))} if scheme.format == "w8a8" else {})


def stored_arrays(quantized: Quantized, scheme: Scheme) -> dict[str, Array]:
    """The tensors of `stored_specs` as arrays ready for `TensorWriter` (fp8 as uint8 bits)."""
    values: Array = quantized.values
    if scheme.format == "int4":
        values = pack_int4(quantized.values)
    elif scheme.format == "fp8":
        values = values.view(np.uint8)
    arrays = {"": values, SCALES: quantized.scales}
    if quantized.input_scale is not None:
        arrays[INPUT_SCALE] = np.array([quantized.input_scale], np.float32)
    return arrays


def dequantize(stored: Array, scales: Array, scheme: Scheme) -> Float32:
    """What a stored weight stands for.

    Args:
        stored: the bytes as they lie in the bundle: packed for int4, uint8 bits for fp8.
        scales: beside them.
        scheme: their form.

    Returns:
        float32 [..., N, K].
    """
    if scheme.format == "fp8":
        numbers = e4m3_values()[stored.view(np.uint8)]
    else:
        numbers = (unpack_int4(stored) if scheme.format == "int4" else stored).astype(np.float32)
    per_value = scales.astype(np.float32)[..., None]
    if not scheme.grouped:
        return numbers * per_value
    grouped = numbers.reshape(*numbers.shape[:-1], -1, scheme.group_size)
    grouped *= per_value
    return grouped.reshape(numbers.shape)


def restore(quantized: Quantized, scheme: Scheme) -> Float32:
    """What a quantised block stands for, float32 [N, K]; as `dequantize` of its stored form."""
    return dequantize(stored_arrays(quantized, scheme)[""], quantized.scales, scheme)


def e4m3_values() -> Float32:
    """The 256 numbers of float8 E4M3 without infinities: bias 7, 448 the largest, 0x7f and 0xff are NaN."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float64)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    numbers = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    numbers[bits & 127 == 127] = np.nan
    return np.where(bits >= 128, -numbers, numbers).astype(np.float32)
