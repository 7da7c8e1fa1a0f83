"""Static key and value buffers, shared by prefill and decode and updated in place."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.backends.session import Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency

Ids = NDArray[np.int64]

_ALL = slice(None)


class KVCache:
    """One buffer for the keys and one for the values of every layer, each [rows, kv_heads, capacity, head_dim].

    The graphs take a buffer as `past_key_values.%d.key` and write it as `present.%d.key`; bound to both names it is
    updated in place. Memory is taken page by page as tokens arrive, not at once.

    With beams a request has `num_beams` rows, one after another. Its prompt is run once: prefill sees the first `batch`
    rows, and `spread` copies what it wrote there to the beams.

    Args:
        bundle: gives the shapes.
        batch: requests.
        num_beams: rows of a request.

    Attributes:
        batch: requests.
        num_beams: rows of a request.
        lengths: int64 [batch * num_beams]; tokens held by each row.
        capacity: tokens a row can hold.
        constants: further inputs of the decoder that stay the same at every step, each [1, ...] for all rows, or
            [batch, ...] with a row for each request.

    Raises:
        MissingDependency: the system has no room for that many rows.
    """

    def __init__(self, bundle: Bundle, batch: int, num_beams: int = 1) -> None:
        model = bundle.model
        self.batch = batch
        self.num_beams = num_beams
        self.capacity = bundle.kv_cache.capacity
        self.constants: Mapping[str, NDArray[np.float32]] = {}
        shape = (batch * num_beams, model.num_key_value_heads, self.capacity, model.head_dim)
        dtype = np.dtype(bundle.kv_cache.dtype)
        self._shared = np.zeros(batch, np.int64)  # positions of a request that are the same in all its rows
        self._buffers = {
            f"{layer}.{kind}": _lazy_zeros(shape, dtype)
            for layer in range(model.num_hidden_layers)
            for kind in ("key", "value")
        }
        self.lengths = np.zeros(batch * num_beams, np.int64)

    def bind(self, session: Session, rows: slice = _ALL) -> None:
        """Tie a decoder's past inputs and present outputs to rows of these buffers, by default all; and constants.

        Args:
            session: of a decoder graph.
            rows: one row of each request (as long as `batch`), a single one of these, or all.
        """
        first, last, _ = rows.indices(self.batch * self.num_beams)
        for name, array in self.constants.items():
            session.bind(name, _constant_rows(array, slice(first, last), self.batch, self.num_beams))
        for name, buffer in self._buffers.items():
            part = buffer if last - first == len(buffer) else buffer[first:last]
            session.bind(f"past_key_values.{name}", part)
            session.bind(f"present.{name}", part)

    def spread(self) -> None:
        """Give every beam what the prefill of its request wrote, which lies in row i for request i."""
        self._shared = self.lengths[: self.batch].copy()
        for buffer in self._buffers.values():
            for request in reversed(range(self.batch)):  # its rows begin behind those that are still to be spread
                for row in self._rows(request):
                    if row != request:
                        buffer[row, :, : self._shared[request]] = buffer[request, :, : self._shared[request]]
        self.lengths[:] = np.repeat(self._shared, self.num_beams)

    def reorder(self, sources: Ids) -> None:
        """Let row i hold what row `sources[i]` holds, for all rows at once.

        Only rows that change are touched, and of them only the positions behind the prompt, which all beams share.

        Args:
            sources: int64 [batch * num_beams]; a row of the same request each, and all rows of a request equally long.
        """
        moves = _moves(sources.tolist())
        for buffer in self._buffers.values():
            spare = buffer[:0]
            for target, source in moves:
                row = max(target, source)
                kept = slice(self._shared[row // self.num_beams], self.lengths[row])
                if target == _SPARE:
                    spare = buffer[source, :, kept].copy()
                else:
                    buffer[target, :, kept] = spare if source == _SPARE else buffer[source, :, kept]

    def addresses(self) -> dict[str, int]:
        """Memory address of each buffer by its name (`0.key`, `0.value`, ...)."""
        return {name: buffer.ctypes.data for name, buffer in self._buffers.items()}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """The buffer called `0.key`, `0.value`, ..., for inspection: [rows, kv_heads, capacity, head_dim]."""
        return self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def _rows(self, request: int) -> range:
        return range(request * self.num_beams, (request + 1) * self.num_beams)


def _constant_rows(array: NDArray[np.float32], rows: slice, batch: int, num_beams: int) -> NDArray[np.float32]:
    """What stays the same for rows of a cache, given once for all requests or once for each."""
    if len(array) == 1:
        return array
    if rows.stop <= batch:  # prefill: a row for each request
        return array[rows]
    return np.repeat(array, num_beams, axis=0)


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
