"""How fast memory can be read: 512 MB of float32 in as many parts as threads, by the fastest of numpy's reductions."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

TOTAL = 512 * 2**20
_REPEAT = 3
_READERS = (np.max, lambda part: np.dot(part, part), lambda part: np.bitwise_or.reduce(part.view(np.uint64)))


def missing(options: dict[str, Any]) -> None:
    """Nothing is."""


class Engine:
    """`sample` answers with `bytes_per_second`; options: `threads`, and `bytes` instead of 512 MB."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        threads = int(options["threads"])
        total = int(options.get("bytes", TOTAL))
        self._parts = [np.ones(total // 4 // threads, np.float32) for _ in range(threads)]

    def about(self) -> dict[str, Any]:
        """The packages used."""
        return {"numpy": np.__version__}

    def sample(self, **_: Any) -> dict[str, float]:
        """The best of a few passes."""
        return {"bytes_per_second": max(self._pass(reader) for reader in _READERS for _ in range(_REPEAT))}

    def _pass(self, reader: Any) -> float:
        barrier = threading.Barrier(len(self._parts) + 1)

        def read(part: np.ndarray) -> None:
            barrier.wait()
            reader(part)
            barrier.wait()

        threads = [threading.Thread(target=read, args=(part,)) for part in self._parts]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        barrier.wait()
        seconds = time.perf_counter() - started
        for thread in threads:
            thread.join()
        return sum(part.nbytes for part in self._parts) / seconds
