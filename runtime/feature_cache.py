"""Features of pictures seen before: the second question on a picture runs no encoder (spec mome.md, 6.4)."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Key = tuple[str, str]


class FeatureCache:
    """Features by the digest of the picture and the encoder; the one used longest ago goes first.

    May be used from several threads.

    Args:
        budget: bytes that all features together may take; 0 keeps nothing.

    Attributes:
        budget: as given.
        hits: lookups that found something.
        misses: lookups that found nothing.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Key, Floats] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        """Whether a lookup would find something; this is not one, and counts and moves nothing."""
        return key in self._entries

    def get(self, key: Key) -> Floats | None:
        """The features under (digest, encoder), read-only, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            return found

    def put(self, key: Key, features: Floats) -> None:
        """Keep features, unless they alone exceed the budget; they become read-only."""
        if features.nbytes > self.budget:
            return
        if features.base is not None and getattr(features.base, "nbytes", None) != features.nbytes:
            features = features.copy()  # a part would keep the whole alive
        features.flags.writeable = False
        with self._lock:
            self._drop(key)
            self._entries[key] = features
            self._bytes += features.nbytes
            while self._bytes > self.budget:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget all features; the counters stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _drop(self, key: Key) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped.nbytes
