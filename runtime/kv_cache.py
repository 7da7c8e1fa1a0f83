"""Static key and value buffers, shared by prefill and decode and updated in place."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.backends.session import Session
from moiie_runtime.bundle import Bundle


class KVCache:
    """One buffer for the keys and one for the values of every layer, each [batch, kv_heads, capacity, head_dim].

    The graphs take a buffer as `past_key_values.%d.key` and write it as `present.%d.key`; bound to both names it is
    updated in place. Memory is taken page by page as tokens arrive, not at once.

    Args:
        bundle: gives the shapes.
        batch: rows.

    Attributes:
        lengths: int64 [batch]; tokens held by each row.
        capacity: tokens a row can hold.
    """

    def __init__(self, bundle: Bundle, batch: int) -> None:
        model = bundle.model
        self.capacity = bundle.kv_cache.capacity
        self.lengths = np.zeros(batch, np.int64)
        shape = (batch, model.num_key_value_heads, self.capacity, model.head_dim)
        dtype = np.dtype(bundle.kv_cache.dtype)
        self._buffers = {
            f"{layer}.{kind}": _lazy_zeros(shape, dtype)
            for layer in range(model.num_hidden_layers)
            for kind in ("key", "value")
        }

    def bind(self, session: Session) -> None:
        """Tie the past inputs and present outputs of a decoder to these buffers."""
        for name, buffer in self._buffers.items():
            session.bind(f"past_key_values.{name}", buffer)
            session.bind(f"present.{name}", buffer)

    def addresses(self) -> dict[str, int]:
        """Memory address of each buffer by its name (`0.key`, `0.value`, ...)."""
        return {name: buffer.ctypes.data for name, buffer in self._buffers.items()}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """The buffer called `0.key`, `0.value`, ..., for inspection: [batch, kv_heads, capacity, head_dim]."""
        return self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[np.float32]) -> NDArray[np.float32]:
    """Zeros whose pages are taken when they are first written.

    `numpy.zeros` asks the kernel for huge pages: with 2 MiB of slots a head, the first token would take the memory of
    the whole buffer.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # not Linux
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
