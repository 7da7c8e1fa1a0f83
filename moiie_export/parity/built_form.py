"""Which form of a bundle is compared."""

from __future__ import annotations

from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import PORTABLE, Engine, open_engine, refuse_gpu


def built_form(bundle: Bundle, target: str, gpu: int | None) -> Engine | None:
    """A form that `moiie build` made, on this GPU if one is named; None for the bundle's own graphs.

    Raises:
        MissingDependency: the bundle was not built for the target.
        MoiieError: the engine is damaged, or a GPU is named for what runs on none.
    """
    if target != PORTABLE:
        return open_engine(bundle, target, gpu)
    refuse_gpu(target, gpu)
    return None
