"""The bounds that a bundle's recipe states, read back from bundle.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from moiie_export.recipe_parity import Bounds, BoundsByDtype, QuantizedBounds
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine
from moiie_runtime.errors import MoiieError

ENGINE = "engine_int8"
HALF_ENGINE = "engine_half"


def bounds_kind(bundle: Bundle, engine: Engine | None, formats: Sequence[str]) -> str:
    """Which of the recipe's bounds hold for what runs.

    Args:
        bundle: gives the storage type.
        engine: a built form; None for the bundle's own graphs.
        formats: of the quantised weights.
    """
    rounds = engine is not None and engine.backend == "onnxruntime" and bool(formats)
    if rounds or "w8a8" in formats:  # w8a8 rounds in the graph
        return ENGINE
    precision = {} if engine is None else engine.document.get("settings", {})
    return HALF_ENGINE if precision.get("precision", "float32") != "float32" else bundle.dtype


def read_bounds(bundle: Bundle, kinds: Sequence[str]) -> BoundsByDtype:
    """The stated bounds of these kinds; the others are the defaults, and nothing may be judged by them.

    Args:
        bundle: the bundle.
        kinds: fields of `BoundsByDtype`.

    Raises:
        MoiieError: a kind is missing, or is not a number for each of its keys.
    """
    classes = get_type_hints(BoundsByDtype)
    return BoundsByDtype(**{kind: _section(bundle, kind, classes[kind]) for kind in kinds})


def _section(bundle: Bundle, kind: str, cls: type[Bounds | QuantizedBounds]) -> Any:
    where = f"{bundle.root / 'bundle.json'}: recipe.parity.bounds.{kind}"
    section: Any = bundle.raw
    for key in ("recipe", "parity", "bounds", kind):
        section = section.get(key) if isinstance(section, dict) else None
    names = {each.name for each in fields(cls)}
    numbers = isinstance(section, dict) and all(type(value) in (int, float) for value in section.values())
    if not numbers or set(section) != names:
        raise MoiieError(
            f"{where}: expected a number for each of {', '.join(sorted(names))}", "export the bundle again"
        )
    return cls(**section)
