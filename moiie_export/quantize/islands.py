"""Float32 islands: linear layers through which more flows than float16 can hold.

An island's weight is stored as float32 whatever the bundle's dtype and rules say, and bundle.json lists it under
`quantization.islands`. A CPU computes in float32 in any case. Targets that compute in float16 keep the nodes that read
an island's weight in float32, their inputs and outputs included, and the residual stream from the first island that
writes to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from moiie_export.parity.cases import from_recipe
from moiie_export.quantize.needs import case_fingerprint
from moiie_export.recipe_parity import ParityCase
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_export.source import ModelSource
from moiie_export.stages import Progress
from moiie_runtime.errors import MissingDependency, Unsound

AUTO, NONE = "auto", "none"
RANGES = "ranges"
"""Name of the stage that measures."""
RANGES_CODE = 1
"""Raised whenever the probe would find other islands for the same prompts."""


def find_islands(wanted: Sequence[str], source: ModelSource, measured: Sequence[str] = ()) -> list[str]:
    """The parameters that `export.islands` means, in the order of the weight map.

    Args:
        wanted: `auto`, `none`, or names with wildcards; nothing is none.
        source: the checkpoint.
        measured: what `auto` stands for, from `probe`.

    Raises:
        Unsound: a name that no such weight has, or `none` beside others.
    """
    candidates = [
        name
        for weight in source.weight_map.weights
        for name, (_, shape) in weight.parameters().items()
        if len(shape) == 2 and not weight.keep_float32
    ]
    if NONE in wanted:
        if len(wanted) > 1:
            raise Unsound("export.islands: `none` stands beside others", "leave it out")
        return []
    chosen: set[str] = set()
    for pattern in wanted:
        chosen.update(measured if pattern == AUTO else _matching(pattern, candidates))
    return [name for name in candidates if name in chosen]


def probe_inputs(source: ModelSource, cases: Sequence[ParityCase]) -> list[Any]:
    """What decides what `probe` finds, for a fingerprint.

    Raises:
        Unsound: there are no cases.
        MoiieError: a picture of theirs is missing.
    """
    if not cases:
        raise Unsound(
            "export.islands: auto measures on calibration.cases, and there are none",
            "list prompts with pictures there, or take names from `moiie parity --ranges`",
        )
    return [RANGES_CODE, source.hashes, repr(source.config), case_fingerprint(cases)]


def probe(source: ModelSource, cases: Sequence[ParityCase], progress: Progress) -> list[str]:
    """Run the prompts through the reference: the parameters whose layers float16 could not compute.

    Args:
        source: the checkpoint.
        cases: the recipe's `calibration.cases`.
        progress: called with "ranges", steps done and steps in all.
    """
    try:
        from moiie_export.model.ranges import measure_ranges
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"export.islands: auto needs {error.name}", "pip install 'moiie-export[export]'"
        ) from error
    return measure_ranges(source, from_recipe(cases), lambda done, total: progress(RANGES, done, total)).islands


def with_islands(section: QuantizationSection, islands: Sequence[str]) -> QuantizationSection:
    """The rules with one in front that keeps the islands in float32."""
    if not islands:
        return section
    return replace(section, rules=(QuantRule(tuple(islands), "float32"), *section.rules))


def _matching(pattern: str, candidates: Sequence[str]) -> list[str]:
    hits = [name for name in candidates if fnmatchcase(name, pattern)]
    if not hits:
        near = ", ".join(difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0))
        raise Unsound(f"export.islands: {pattern!r}: no weight of a linear layer has this name", f"nearest: {near}")
    return hits
