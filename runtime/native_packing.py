"""Quantised weights in the order that the CPU operators read (native/layout.h says which).

A weight [N, K] is stored as in a bundle: int8 [N, K], or int4 [N, K/2] with two signed values a byte and the even column
in the low half; scales are float16 [N, K/group]. Packed, it is a row of bytes that a runtime maps and reads once from
front to back: blocks of 32 rows, and in each its groups of columns with their scales in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError

BLOCK_ROWS = 32
_Number = TypeVar("_Number", np.int8, np.float16)
_STRIP = 32  # columns that share the scale of an activation
_SCALE_BYTES = 2 * BLOCK_ROWS
_CHUNK_BYTES = 4 << 20  # of stored weights, done at a time


def packed_bytes(rows: int, columns: int, bits: int, group: int, swiglu: bool = False) -> int:
    """Length of a packed weight [rows, columns].

    Args:
        rows: N; with `swiglu` 2 x I.
        columns: K, a multiple of `group`.
        bits: 4 or 8.
        group: columns that share a scale: 32, 64 or 128.
        swiglu: the rows are [gate | up].

    Raises:
        MoiieError: such a weight cannot be packed.
    """
    _check(rows, columns, bits, group, swiglu)
    return _blocks(rows, swiglu) * _block_bytes(columns, bits, group)


def pack(values: NDArray[np.int8], scales: NDArray[np.float16], bits: int, swiglu: bool = False) -> NDArray[np.uint8]:
    """A packed weight from one value a byte.

    Args:
        values: [N, K]; with 4 bits from -8 to 7.
        scales: [N, K/group].
        bits: 4 or 8.
        swiglu: the rows are [gate | up]; the packed weight has them in pairs.

    Raises:
        MoiieError: the shapes do not fit, or a value does not fit into its bits.
    """
    if bits == 4:
        if values.size and (values.min() < -8 or values.max() > 7):
            raise MoiieError("an int4 weight has values outside -8..7")
        if values.ndim != 2 or values.shape[1] % 2:
            raise MoiieError(f"an int4 weight must be [N, K] with even K, not {list(values.shape)}")
        values = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
    return pack_stored(values, scales, bits, swiglu)


def pack_stored(
    stored: NDArray[np.int8], scales: NDArray[np.float16], bits: int, swiglu: bool = False
) -> NDArray[np.uint8]:
    """A packed weight from the form it has in a bundle.

    Args:
        stored: int8 [N, K], or int4 [N, K/2].
        scales: [N, K/group].
        bits: 4 or 8.
        swiglu: the rows are [gate | up]; the packed weight has them in pairs.

    Raises:
        MoiieError: the shapes do not fit.
    """
    return np.concatenate(list(pack_chunks(stored, scales, bits, swiglu)))


def pack_chunks(
    stored: NDArray[np.int8], scales: NDArray[np.float16], bits: int, swiglu: bool = False
) -> Iterator[NDArray[np.uint8]]:
    """The same as `pack_stored` in consecutive pieces of a few megabytes, for weights that are mapped and written out."""
    if stored.ndim != 2 or scales.ndim != 2 or bits not in (4, 8) or not scales.shape[1]:
        raise MoiieError(f"cannot pack a weight {list(stored.shape)} with scales {list(scales.shape)} and {bits} bits")
    rows, columns = stored.shape[0], stored.shape[1] * 8 // bits
    group = columns // scales.shape[1]
    if scales.shape[0] != rows or group * scales.shape[1] != columns:
        raise MoiieError(f"scales {list(scales.shape)} do not fit a weight [{rows}, {columns}]")
    _check(rows, columns, bits, group, swiglu)
    blocks, step = _blocks(rows, swiglu), max(1, _CHUNK_BYTES // (BLOCK_ROWS * stored.shape[1]))
    for first in range(0, blocks, step):
        last = min(blocks, first + step)
        chunk = np.empty(
            (last - first, columns // group, _block_bytes(columns, bits, group) * group // columns), np.uint8
        )
        words = _words(_rows(stored, first, last, swiglu), bits)
        strips = words.reshape(last - first, BLOCK_ROWS, columns // group, -1).transpose(0, 2, 3, 1)
        chunk[..., _SCALE_BYTES:].view("<u4").reshape(strips.shape)[...] = strips
        chunk[..., :_SCALE_BYTES].view("<f2")[...] = _rows(scales, first, last, swiglu).transpose(0, 2, 1)
        yield chunk.reshape(-1)


def _words(stored: NDArray[np.int8], bits: int) -> NDArray[np.uint32]:
    """Unsigned values, four bytes in a word: 4 columns of 8 bits, or 8 of 4 bits with columns j and 4 + j in byte j."""
    words: NDArray[np.uint32] = np.ascontiguousarray(stored).view("<u4")
    words = words ^ np.uint32(0x80808080 if bits == 8 else 0x88888888)
    if bits == 4:  # columns 01 23 45 67 -> 01 45 23 67 -> 04 15 26 37
        for shift, mask in ((np.uint32(8), np.uint32(0x0000FF00)), (np.uint32(4), np.uint32(0x00F000F0))):
            swapped = (words >> shift ^ words) & mask
            words ^= swapped ^ swapped << shift
    return words


def _rows(matrix: NDArray[_Number], first: int, last: int, swiglu: bool) -> NDArray[_Number]:
    """Rows of blocks first .. last - 1 as [blocks, 32, columns]; rows past the end are zero."""
    if not swiglu:
        return _padded(matrix, first * BLOCK_ROWS, last * BLOCK_ROWS).reshape(last - first, BLOCK_ROWS, -1)
    half, middle = BLOCK_ROWS // 2, matrix.shape[0] // 2
    parts = [_padded(part, first * half, last * half) for part in (matrix[:middle], matrix[middle:])]
    return np.stack([part.reshape(last - first, half, -1) for part in parts], axis=1).reshape(
        last - first, BLOCK_ROWS, -1
    )


def _padded(matrix: NDArray[_Number], first: int, last: int) -> NDArray[_Number]:
    missing = last - matrix.shape[0]
    rows = matrix[first:last]
    return rows if missing <= 0 else np.pad(rows, ((0, missing), (0, 0)))


def _blocks(rows: int, swiglu: bool) -> int:
    return -(-rows // 2 // (BLOCK_ROWS // 2)) if swiglu else -(-rows // BLOCK_ROWS)


def _block_bytes(columns: int, bits: int, group: int) -> int:
    return columns // group * (_SCALE_BYTES + group * BLOCK_ROWS * bits // 8)


def _check(rows: int, columns: int, bits: int, group: int, swiglu: bool) -> None:
    if bits not in (4, 8) or group not in (32, 64, 128):
        raise MoiieError(
            f"the CPU operators have no int{bits} with groups of {group}", "bits 4 or 8, groups 32, 64 or 128"
        )
    if rows < 1 or columns < 1 or columns % group or (swiglu and rows % 2):
        pairs = " in pairs of gate and up" if swiglu else ""
        raise MoiieError(f"a weight [{rows}, {columns}]{pairs} cannot be packed in groups of {group}")
