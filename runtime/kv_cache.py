"""Static key and value buffers, shared by prefill and decode and updated in place, on the host or on a device."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.backends.device import Device, DeviceBuffer
from moiie_runtime.backends.session import Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency, MoiieError

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Buffer = Floats | DeviceBuffer

_ALL = slice(None)


class KVCache:
    """One buffer for the keys and one for the values of every layer, each [rows, kv_heads, capacity, head_dim].

    The graphs take a buffer as `past_key_values.%d.key` and write it as `present.%d.key`; bound to both names it is
    updated in place. On the host memory is taken page by page as tokens arrive, not at once; on a device all at once, when
    the cache is first bound, and it is given back by `close`.

    With beams a request has `num_beams` rows, one after another. Its prompt is run once: prefill sees the first `batch`
    rows, and `spread` copies what it wrote there to the beams.

    Graphs with static shapes are always bound to as many rows as they have; those behind the last request hold noise.

    Args:
        bundle: gives the shapes.
        batch: requests.
        num_beams: rows of a request.
        device: where the buffers lie; None: on the host.

    Attributes:
        batch: requests.
        num_beams: rows of a request.
        rows: rows of the buffers.
        static: whether the graphs always have that many.
        lengths: int64 [batch * num_beams]; tokens held by each row.
        capacity: tokens a row can hold.
        constants: further inputs of the decoder that stay the same at every step, each [1, ...] for all rows, or
            [batch, ...] with a row for each request.

    Raises:
        MissingDependency: the system has no room for that many rows.
        MoiieError: the graphs have fewer rows than that.
    """

    def __init__(self, bundle: Bundle, batch: int, num_beams: int = 1, device: Device | None = None) -> None:
        model = bundle.model
        self.batch = batch
        self.num_beams = num_beams
        self.capacity = bundle.kv_cache.capacity
        self.constants: Mapping[str, Floats] = {}
        self.rows = _rows(bundle, batch, num_beams)
        self.static = static_rows(bundle) is not None
        self._shape = (self.rows, model.num_key_value_heads, self.capacity, model.head_dim)
        self._dtype = bundle.kv_cache.dtype
        self._device = device
        self._names = [f"{layer}.{kind}" for layer in range(model.num_hidden_layers) for kind in ("key", "value")]
        self._shared = np.zeros(batch, np.int64)  # positions of a request that are the same in all its rows
        self._buffers: dict[str, Buffer] = {}
        self._spare: Buffer | None = None  # a row for rows that change places
        if device is None:
            self._allocated()
        self.lengths = np.zeros(batch * num_beams, np.int64)

    def bind(self, session: Session, rows: slice = _ALL) -> None:
        """Tie a decoder's past inputs and present outputs to rows of these buffers, by default all; and constants.

        Args:
            session: of a decoder graph.
            rows: one row of each request (as long as `batch`), a single one of these, or all.
        """
        first, last, _ = rows.indices(self.batch * self.num_beams)
        for name, array in self.constants.items():
            session.bind(name, self._constant_rows(array, slice(first, last)))
        whole = self.static or last - first == self.rows
        for name, buffer in self._allocated().items():
            part = buffer if whole else _part(buffer, first, last)
            session.bind(f"past_key_values.{name}", part)
            session.bind(f"present.{name}", part)

    def fill_up(self, array: NDArray[Any]) -> NDArray[Any]:
        """What is fed for the first rows, with rows of zeros below it where the graphs always have more."""
        missing = self.rows - len(array) if self.static else 0
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    def put(self, name: str, row: int, start: int, values: Floats) -> None:
        """Write [kv_heads, n, head_dim] into a row of the buffer `name`, from position `start` on."""
        buffer = self._allocated()[name]
        stop = start + values.shape[1]
        if isinstance(buffer, np.ndarray):
            buffer[row, :, start:stop] = values
            return
        part = buffer.rows(row, row + 1)
        held = part.numpy()
        held[0, :, start:stop] = values
        part.write(held)

    def spread(self) -> None:
        """Give every beam what the prefill of its request wrote, which lies in row i for request i."""
        self._shared = self.lengths[: self.batch].copy()
        for buffer in self._allocated().values():
            for request in reversed(range(self.batch)):  # its rows begin behind those that are still to be spread
                for row in range(request * self.num_beams, (request + 1) * self.num_beams):
                    if row != request:
                        _copy((buffer, row), (buffer, request), 0, int(self._shared[request]))
        self.lengths[:] = np.repeat(self._shared, self.num_beams)

    def reorder(self, sources: Ids) -> None:
        """Let row i hold what row `sources[i]` holds, for all rows at once.

        Only rows that change are touched, and of them only the positions behind the prompt, which all beams share.

        Args:
            sources: int64 [batch * num_beams]; a row of the same request each, and all rows of a request equally long.
        """
        moves = _moves(sources.tolist())
        for buffer in self._allocated().values():
            for target, source in moves:
                row = max(target, source)
                first, last = int(self._shared[row // self.num_beams]), int(self.lengths[row])
                _copy(self._place(buffer, target), self._place(buffer, source), first, last)

    def close(self) -> None:
        """Give buffers on a device back. What is bound again afterwards are new ones, full of zeros."""
        if self._device is None:
            return
        for buffer in (*self._buffers.values(), self._spare):
            if buffer is not None and not isinstance(buffer, np.ndarray):
                buffer.free()
        self._buffers, self._spare = {}, None

    def addresses(self) -> dict[str, int]:
        """Memory address of each buffer by its name (`0.key`, `0.value`, ...)."""
        buffers = self._allocated().items()
        return {name: each.ctypes.data if isinstance(each, np.ndarray) else each.address for name, each in buffers}

    def __getitem__(self, name: str) -> Floats:
        """The buffer called `0.key`, `0.value`, ..., for inspection: [rows, kv_heads, capacity, head_dim].

        On the host the buffer itself; from a device a copy.
        """
        buffer = self._allocated()[name]
        return buffer if isinstance(buffer, np.ndarray) else buffer.numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def _allocated(self) -> dict[str, Buffer]:
        try:
            for name in self._names if not self._buffers else ():
                self._buffers[name] = self._zeros(self._shape)
        except MissingDependency:
            self.close()  # what there was room for is of no use
            raise
        return self._buffers

    def _zeros(self, shape: tuple[int, ...]) -> Buffer:
        if self._device is None:
            return _lazy_zeros(shape, np.dtype(self._dtype))
        buffer = self._device.empty(shape, self._dtype, "the KV cache")
        buffer.clear()  # a masked slot counts with weight 0, which a NaN would survive
        return buffer

    def _place(self, buffer: Buffer, row: int) -> tuple[Buffer, int]:
        """Row `row` of a buffer, or the spare row."""
        if row != _SPARE:
            return buffer, row
        if self._spare is None:
            self._spare = self._zeros((1, *self._shape[1:]))
        return self._spare, 0

    def _constant_rows(self, array: Floats, rows: slice) -> Floats:
        """What stays the same for rows of the cache, given once for all requests or once for each."""
        if self.static:
            row = np.minimum(np.arange(self.rows), self.batch * self.num_beams - 1)
            request = row if rows.stop <= self.batch else row // self.num_beams
            return array[np.minimum(request, len(array) - 1)]
        if len(array) == 1:
            return array
        if rows.stop <= self.batch:  # prefill: a row for each request
            return array[rows]
        return np.repeat(array, self.num_beams, axis=0)


def static_rows(bundle: Bundle) -> int | None:
    """Rows that the decoder's graphs always have; None when they take any number."""
    spec = bundle.components["decoder_decode"].inputs.get("past_key_values.0.key")
    rows = spec.shape[0] if spec is not None and spec.shape else None
    return rows if isinstance(rows, int) else None


def _rows(bundle: Bundle, batch: int, num_beams: int) -> int:
    """Rows of the buffers."""
    wanted, there = batch * num_beams, static_rows(bundle)
    if there is None:
        return wanted
    if wanted > there:
        raise MoiieError(
            f"{bundle.name}: {batch} requests with {num_beams} beams each take {wanted} rows, "
            f"this form of the bundle was built for {there}",
            f"ask for less at once, or set batch: {wanted} for the target and build it again",
        )
    return there


def _part(buffer: Buffer, first: int, last: int) -> Buffer:
    return buffer[first:last] if isinstance(buffer, np.ndarray) else buffer.rows(first, last)


def _copy(target: tuple[Buffer, int], source: tuple[Buffer, int], first: int, last: int) -> None:
    """Copy positions [first, last) of a row of one buffer into a row of another, or of the same one."""
    (into, row), (out_of, source_row) = target, source
    if isinstance(into, np.ndarray):
        assert isinstance(out_of, np.ndarray)
        into[row, :, first:last] = out_of[source_row, :, first:last]
    else:
        assert not isinstance(out_of, np.ndarray)
        into.copy_positions(row, out_of, source_row, (first, last))


_SPARE = -1


def _moves(sources: list[int]) -> list[tuple[int, int]]:
    """Copies (target, source) that bring every row its source, in an order that overwrites no row before it was read.

    Where rows change places in a circle, one of them is first copied to a spare row, and from there in the end.
    """
    pending = {row: source for row, source in enumerate(sources) if row != source}
    readers = Counter(pending.values())
    free = [row for row in pending if not readers[row]]
    moves = []
    while pending:
        if not free:
            row = next(iter(pending))
            moves.append((_SPARE, row))
            pending[next(target for target, source in pending.items() if source == row)] = _SPARE
            free.append(row)
        row = free.pop()
        source = pending.pop(row)
        moves.append((row, source))
        readers[source] -= 1
        if source in pending and not readers[source]:
            free.append(source)
    return moves


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[np.float32]) -> NDArray[np.float32]:
    """Zeros whose pages are taken when they are first written.

    `numpy.zeros` asks the kernel for huge pages: with 2 MiB of slots a head, the first token would take the memory of
    the whole buffer.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # not Linux
        return np.zeros(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MissingDependency(
            f"the system has no room for a key or value buffer {list(shape)} of {size} bytes: {error}",
            "use fewer beams or a smaller batch, or export the bundle with a smaller max_context",
        ) from error
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
