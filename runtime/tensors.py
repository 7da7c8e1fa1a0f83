"""Tensors in a safetensors file: views and row blocks of one shared mapping, and (see tensor_writer.py) the writer.

numpy has no bfloat16 and the safetensors library gives no byte offsets, which ONNX external data needs; hence our own.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import INCOMPLETE, open_regular, quote
from moiie_runtime.tensor_header import (
    ITEM_SIZES,
    NUMPY_DTYPES,
    TensorInfo,
    read_header,
    read_header_and_metadata,
    read_metadata,
)
from moiie_runtime.tensor_writer import TensorWriter, save_tensors

__all__ = [
    "TensorFile",
    "TensorInfo",
    "TensorWriter",
    "cast_rows",
    "read_header",
    "read_metadata",
    "save_tensors",
]

Array = npt.NDArray[Any]

_FLOATS = ("F64", "F32", "F16", "BF16")

_FETCH, _COLD = 3, 20
"""Advice to Linux: MADV_WILLNEED, and MADV_COLD, which Python has no name for."""


class TensorFile:
    """A safetensors file, mapped read-only.

    Nothing is read until it is used, and what is read is page cache, not memory of this process. The file must not be
    shortened while it is open. Views stay valid after `close`.

    Attributes:
        path: the file.
        header: its tensors, in the order of their bytes.
        metadata: its free-form strings.

    Raises:
        MoiieError: on opening a file that is not a well-formed safetensors file (see `read_header`).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header, self.metadata = read_header_and_metadata(self.path)
        with open_regular(self.path) as file:
            try:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise MoiieError(f"{self.path}: cannot be mapped into memory: {error}", INCOMPLETE) from error
        expected = max((info.offset + info.nbytes for info in self.header.values()), default=0)
        if len(mapping) < expected:  # it shrank since the header was read
            raise MoiieError(f"{self.path}: expected {expected} bytes, found {len(mapping)}", INCOMPLETE)
        self._mapping: mmap.mmap | None = mapping
        self._bytes: Array | None = np.frombuffer(mapping, np.uint8)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.header

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of their bytes."""
        return list(self.header)

    def __getitem__(self, name: str) -> Array:
        """A read-only view of a whole tensor, in its own dtype and shape.

        Raises:
            MoiieError: no such tensor, or a dtype that numpy lacks (BF16 and the 8-bit floats).
        """
        info = self._info(name)
        if info.dtype not in NUMPY_DTYPES:
            raise MoiieError(
                f"{self.path}: tensor {quote(name)} is {info.dtype}, which numpy cannot show as it is",
                "read it with rows(), which converts BF16 to float32, or with bits()",
            )
        return self._raw(info).view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def bits(self, name: str) -> Array:
        """A read-only view of a whole tensor as the bytes in which it is stored.

        Returns:
            uint8 [*shape], which is a number each for the 8-bit types, and [*shape, bytes of a number] for others.

        Raises:
            MoiieError: no such tensor.
        """
        info = self._info(name)
        size = ITEM_SIZES[info.dtype]
        return self._raw(info).reshape((*info.shape, size) if size > 1 else info.shape)

    def rows(self, name: str, start: int, stop: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """Rows [start, stop) along the first axis, converted.

        Args:
            name: a tensor of floats (F64, F32, F16 or BF16).
            start: first row.
            stop: the row after the last; a scalar counts as one row.
            dtype: float32 or float16.

        Returns:
            A new writable array [stop - start, *shape[1:]]; memory in proportion to it, whatever the file's size.

        Raises:
            MoiieError: no such tensor, rows outside it, a tensor of integers, a dtype other than these two, or a finite
                number that float16 (or float32, from F64) cannot hold.
        """
        target = np.dtype(dtype)
        if target not in (np.float32, np.float16):
            raise MoiieError(f"rows(): expected dtype float32 or float16, found {target}")
        return cast_rows(self.stored_rows(name, start, stop), target, f"{self.path}: tensor {quote(name)}", start)

    def stored_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) as they are stored, a read-only view; bfloat16 as uint16. Otherwise as `rows`."""
        info = self._info(name)
        if info.dtype not in _FLOATS:
            raise MoiieError(f"{self.path}: tensor {quote(name)}: expected {', '.join(_FLOATS)}, found {info.dtype}")
        shape = info.shape or (1,)
        if not 0 <= start <= stop <= shape[0]:
            raise MoiieError(f"{self.path}: tensor {quote(name)} has {shape[0]} rows, not {start}:{stop}")
        row_bytes = info.nbytes // shape[0] if shape[0] else 0
        raw = self._raw(info)[start * row_bytes : stop * row_bytes]
        return raw.view(NUMPY_DTYPES.get(info.dtype, np.uint16)).reshape((stop - start, *shape[1:]))

    def will_read(self, name: str, start: int, stop: int) -> None:
        """Let the system fetch rows [start, stop) while other things are done; says nothing where it cannot."""
        self._advise(name, start, stop, _FETCH)

    def has_read(self, name: str, start: int, stop: int) -> None:
        """These rows may leave the memory before anything else does, when it gets short."""
        self._advise(name, start, stop, _COLD)

    def _advise(self, name: str, start: int, stop: int, advice: int) -> None:
        info = self.header.get(name)
        if info is None or self._mapping is None or not info.shape:
            return
        row_bytes = info.nbytes // max(1, info.shape[0])
        begin = info.offset + start * row_bytes
        aligned = begin - begin % mmap.PAGESIZE
        with contextlib.suppress(AttributeError, OSError, ValueError):  # another system, an older one, no such rows
            self._mapping.madvise(advice, aligned, info.offset + stop * row_bytes - aligned)

    def close(self) -> None:
        """Give up the mapping; it goes when the last view of it does. Closing twice is allowed."""
        self._bytes = self._mapping = None

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.header[name]
        except KeyError:
            raise MoiieError(f"{self.path}: no tensor {quote(name)} among {len(self.header)}") from None

    def _raw(self, info: TensorInfo) -> Array:
        if self._bytes is None:
            raise MoiieError(f"{self.path}: tensor {quote(info.name)} was asked for after close()")
        return self._bytes[info.offset : info.offset + info.nbytes]


def cast_rows(block: Array, target: npt.DTypeLike, where: str, first_row: int = 0) -> Array:
    """A new writable array with the numbers of a block in another float type.

    Args:
        block: rows [n, ...] of floats, or of uint16: bfloat16 bits, the upper half of a float32.
        target: float32 or float16.
        where: file and tensor, for the message.
        first_row: index of the block's first row in the tensor, for the message.

    Raises:
        MoiieError: a finite number that `target` cannot hold.
    """
    source = block
    if block.dtype == np.uint16:
        source = block.astype(np.uint32)
        np.left_shift(source, 16, out=source)
        source = source.view(np.float32)
    with np.errstate(over="ignore"):  # found and named below
        result = source.astype(target, copy=source is block)
    if result.itemsize < source.itemsize:
        lost = np.isinf(result) & np.isfinite(source)
        if lost.any():
            row = int(lost.argmax()) // (lost.size // len(lost))
            raise MoiieError(
                f"{where}, row {first_row + row}: a finite number is too large for {result.dtype}",
                "export with dtype float32" if result.dtype == np.float16 else None,
            )
    return result
