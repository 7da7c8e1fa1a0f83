"""Chosen values of one run of a graph, whatever session runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from moiie_export.parity.metrics import Array
from moiie_runtime.backends.device import Device
from moiie_runtime.backends.session import Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.kv_cache import KVCache

_PAST, _PRESENT = "past_key_values.", "present."

Caches = Callable[[Mapping[str, Array]], KVCache | None]
"""Makes buffers that hold what is fed for them, where a session wants them; None for a graph without."""


def caches_of(bundle: Bundle, device: Device | None = None) -> Caches:
    """Buffers for the graphs of a bundle, or of a built form in its graphs' place, whose sessions run on `device`."""

    def make(feeds: Mapping[str, Array]) -> KVCache | None:
        given = {name.removeprefix(_PAST): array for name, array in feeds.items() if name.startswith(_PAST)}
        if not given:
            return None
        cache = KVCache(bundle, len(next(iter(given.values()))), device=device)
        for name, array in given.items():
            for row, values in enumerate(array):
                cache.put(name, row, 0, values)
        return cache

    return make


def values(session: Session, names: list[str], feeds: Mapping[str, Array], caches: Caches) -> dict[str, Array]:
    """One run.

    Args:
        session: of the graph.
        names: outputs that are wanted; those of caches are read from the buffers that the graph updates in place.
        feeds: what a portable graph takes; what this one does not is left out.
        caches: of `caches_of`.

    Returns:
        An array for each name; half precision that lay on a device as float32.
    """
    cache = caches(feeds)
    fed = {name: array for name, array in feeds.items() if name in session.inputs and not name.startswith(_PAST)}
    try:
        if cache is not None:
            cache.bind(session)
        outputs = session.run(fed, [name for name in names if not name.startswith(_PRESENT)])
        for name in names:
            if cache is not None and name.startswith(_PRESENT):
                outputs[name] = np.array(cache[name.removeprefix(_PRESENT)])
    finally:
        session.unbind()
        if cache is not None:
            cache.close()
    return outputs
