"""The seam to an accelerator's memory: what the KV cache and every backend with a device of its own use.

Everything that is asked of one device happens in the order in which it was asked, on its one `stream`: a session that
runs its kernels there may read a buffer that was written just before, and nobody waits. Host memory is different: what is
given to a call may be changed, and what a call returns may be read, as soon as the call returns.

Element types are numpy's names and two that numpy lacks: `bfloat16`, whose numbers are float32 on the host, and
`float8_e4m3fn`, whose bits are uint8 there: the host only brings them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BFLOAT16, FLOAT8 = "bfloat16", "float8_e4m3fn"
ITEM_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    BFLOAT16: 2,
    FLOAT8: 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Element type of a device buffer -> bytes of a number."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device.

    Attributes:
        free: what anyone could still get.
        total: all of it.
        allocated: what is held by buffers of this `Device` now.
    """

    free: int
    total: int
    allocated: int


class DeviceBuffer(Protocol):
    """Numbers in a device's memory, contiguous, in C order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""

    @property
    def dtype(self) -> str:
        """Element type, a key of `ITEM_BYTES`."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""

    @property
    def address(self) -> int:
        """Address of the first number on the device; it stays the same until the buffer is freed."""

    def rows(self, first: int, last: int) -> DeviceBuffer:
        """The part [first, last) along the first dimension: the same memory, which only the whole buffer can free."""

    def copy_positions(
        self, target_row: int, source: DeviceBuffer, source_row: int, positions: tuple[int, int]
    ) -> None:
        """Copy positions [first, last) of one row of another KV buffer, or of this one, into the same ones of a row.

        Both are [rows, heads, capacity, head_dim] and alike but for the number of rows; the rows must differ where the
        buffer is the same. Nothing happens for an empty range.
        """

    def write(self, array: Array) -> None:
        """Fill it with an array of its shape; floats are rounded to its element type."""

    def clear(self) -> None:
        """Fill it with zeros."""

    def numpy(self) -> Array:
        """A copy on the host, in its own element type; bfloat16 as float32."""

    def free(self) -> None:
        """Give its memory back; freeing twice, or a part made by `rows`, does nothing. It must not be used afterwards."""


class Device(Protocol):
    """One accelerator, owned by a loaded bundle. Its calls may come from any thread."""

    @property
    def name(self) -> str:
        """For messages and people, for example `NVIDIA GeForce RTX 4090 (CUDA device 0)`."""

    @property
    def index(self) -> int:
        """Number of the device among those that the process sees."""

    @property
    def stream(self) -> int:
        """Handle of the stream (CUDA's `CUstream`) on which everything here happens and sessions must run."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held during every call here, and reentrant: a session holds it while its work on the stream must stay together."""

    def activate(self) -> None:
        """Make the device current for the calling thread, before a library that expects this is called."""

    def empty(self, shape: tuple[int, ...], dtype: str, what: str) -> DeviceBuffer:
        """A buffer with any contents.

        Args:
            shape: sizes of its dimensions.
            dtype: a key of `ITEM_BYTES`.
            what: what it is for, as the message says it when there is no room: `the KV cache`.

        Raises:
            MissingDependency: no room; says how much was asked for, and how much is free and there in all.
        """

    def upload(self, array: Array, what: str, dtype: str | None = None) -> DeviceBuffer:
        """A new buffer with the numbers of a host array.

        Args:
            array: of any shape; it need not be contiguous.
            what: see `empty`.
            dtype: floats are rounded to it; None: the array's own.

        Raises:
            MissingDependency: no room.
        """

    def synchronize(self) -> None:
        """Wait until everything asked for is done.

        Raises:
            MoiieError: something that was asked for earlier failed on the device.
        """

    def memory(self) -> DeviceMemory:
        """What is free, there, and held."""

    def close(self) -> None:
        """Give everything back: all buffers, the stream, the device. Closing twice is allowed."""


def stored(array: Array, dtype: str) -> Array:
    """The array as a device holds it: contiguous, in this element type, bfloat16 as uint16 bits.

    Floats are rounded to the nearest, ties to even; what is too large becomes infinite, as it would on the device.
    """
    if dtype != BFLOAT16:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, storage(dtype))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def on_host(raw: Array, dtype: str) -> Array:
    """What `stored` gave, as numbers of the host: a new array for bfloat16, else the same one."""
    if dtype != BFLOAT16:
        return raw
    return (raw.astype(np.uint32) << 16).view(np.float32)


def storage(dtype: str) -> np.dtype[Any]:
    """numpy's type with which the bytes of an element type are moved."""
    return np.dtype({BFLOAT16: "uint16", FLOAT8: "uint8"}.get(dtype, dtype))
