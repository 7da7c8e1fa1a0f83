"""Stored weights against the checkpoint's: what no prompt reached is proven here.

What is not quantised must be equal bit by bit, factors of AWQ that were moved into it included. A quantised tensor may
differ as much as its bound allows, and each of its scales must be near the one that suits its stored numbers best: a
wrong scale among thousands shows in no average.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moiie_export.parity.metrics import Array
from moiie_export.parity.report import Check, judge, tell
from moiie_export.parity.stored import StoredWeights
from moiie_export.quantize.packing import INPUT_SCALE, SCALES, stored_specs, unpack_int4
from moiie_export.recipe_parity import BoundsByDtype
from moiie_export.source import ModelSource
from moiie_export.weights import Weight

SCALE_FACTOR = 1.6
"""A scale may be this many times the best one for its numbers, or as small a part of it."""


def check_embedding(stored: StoredWeights, tensor: str, source: ModelSource, dtype: str) -> Check:
    """The host's embedding table, every row of it, against the checkpoint's."""
    weight = next(weight for weight in source.weight_map.weights if weight.name == "embed_tokens.weight")
    return tell("embedding", _differences(stored, tensor, weight, source, dtype))


def check_weights(stored: StoredWeights, source: ModelSource, dtype: str, bounds: BoundsByDtype) -> list[Check]:
    """Every stored tensor, read once and in blocks."""
    weights = source.weight_map.weights
    lines = [f"{name} is not one of the checkpoint's" for name in stored.file if name not in _names(stored, weights)]
    lines += [f"{name} is quantised in bundle.json only" for name in stored.schemes if name not in stored.file]
    checks: list[Check] = []
    scales: list[str] = []
    for weight in weights:
        if weight.name in stored.schemes and weight.name in stored.file:
            wrong = list(_form(stored, weight))
            lines += wrong
            if not wrong:
                found = _compare(stored, weight, source)
                scales += found.wrong_scales(weight.name)
                checks.append(_judged(stored, weight.name, found, bounds))
        else:
            lines += _differences(stored, weight.name, weight, source, dtype)
    told = [tell("stored weights", lines, **_place(lines))]
    return [*told, tell("stored scales", scales, **_place(scales)), *checks] if stored.schemes else told


@dataclass
class _Distance:
    """How far a quantised tensor is from its weight: sums of squares, and the worst scale."""

    difference: float = 0.0
    weight: float = 0.0
    worst: float = 1.0
    where: tuple[int, int] = (0, 0)

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of the weight."""
        return math.sqrt(self.difference / self.weight) if self.weight else math.sqrt(self.difference)

    def add(self, row: int, block: Array, values: Array, ratios: Array) -> None:
        """Count rows in. `ratios` [rows, groups]: a scale over the best one for its numbers."""
        self.difference += float(np.square(values - block, dtype=np.float64).sum())
        self.weight += float(np.square(block, dtype=np.float64).sum())
        away = np.where(ratios > 0, np.abs(np.log(np.where(ratios > 0, ratios, 1))), np.inf)
        place = np.unravel_index(int(away.argmax()), away.shape)
        if abs(math.log(self.worst)) < away[place]:
            self.worst = float(ratios[place]) if ratios[place] > 0 else math.inf
            self.where = (row + int(place[0]), int(place[1]))

    def wrong_scales(self, name: str) -> list[str]:
        """A line when a scale is beyond `SCALE_FACTOR`."""
        if abs(math.log(self.worst)) <= math.log(SCALE_FACTOR):
            return []
        row, group = self.where
        return [f"{name}: the scale of row {row}, group {group} is {self.worst:.3g} times what its numbers ask for"]


def _names(stored: StoredWeights, weights: tuple[Weight, ...]) -> set[str]:
    """Tensors that a bundle of these weights may hold."""
    names = {weight.name for weight in weights}
    return names | set(stored.factors) | {name + suffix for name in stored.schemes for suffix in (SCALES, INPUT_SCALE)}


def _form(stored: StoredWeights, weight: Weight) -> Iterator[str]:
    """What is wrong with the tensors of a quantised weight, before a value is read."""
    for suffix, (kind, shape) in stored_specs(weight.shape, stored.schemes[weight.name]).items():
        name = weight.name + suffix
        if name not in stored.file:
            yield f"{name} is missing"
            continue
        info = stored.file.header[name]
        if (info.dtype, info.shape) != (kind, shape):
            yield f"{name} is {info.dtype} {list(info.shape)}, expected {kind} {list(shape)}"
        elif suffix:
            found = stored.file[name]
            if not (np.isfinite(found).all() and (found > 0).all()):
                yield f"{name} holds scales that are not above 0 and finite"


def _compare(stored: StoredWeights, weight: Weight, source: ModelSource) -> _Distance:
    found, row, columns = _Distance(), 0, weight.shape[-1]
    scheme = stored.schemes[weight.name]
    for block in source.blocks(weight):
        rows = block.reshape(-1, columns)
        packed, scales, values = stored.multiplied_rows(weight.name, row, row + len(rows))
        if scheme.format == "fp8":
            numbers = values / scales[:, None]
        else:
            numbers = (unpack_int4(packed) if scheme.format == "int4" else packed).astype(np.float32)
        groups = (len(rows), scheme.groups(columns), -1)
        folded = stored.folded(weight, rows, row)
        ratios = _ratios(folded.reshape(groups), numbers.reshape(groups), scales)
        found.add(row, rows, stored.unfolded(weight, values, row), ratios)
        row += len(rows)
    return found


def _ratios(weight: Array, numbers: Array, scales: Array) -> Array:
    """Each scale over the best one, sum(weight * numbers) / sum(numbers ** 2); 1 where all numbers are zero."""
    energy = np.square(numbers).sum(axis=2)
    best = (weight * numbers).sum(axis=2) / np.where(energy > 0, energy, 1)
    asked = np.where(energy > 0, best, 1)
    ratios: Array = np.where(asked > 0, scales.reshape(energy.shape) / np.where(asked > 0, asked, 1), 0)
    return np.where(energy > 0, ratios, 1)


def _judged(stored: StoredWeights, name: str, found: _Distance, bounds: BoundsByDtype) -> Check:
    scheme = stored.schemes[name]
    bound = {"int4": bounds.int4, "fp8": bounds.fp8}.get(scheme.format, bounds.int8)
    method = stored.methods()[name]
    note = f"{name}, {scheme.format}" + (f" by {method}" if method else "")
    place = _place([name])
    return judge("quantised weights", "error", found.relative, bound.weight_error, note=note, **place)


def _place(lines: list[str]) -> dict[str, Any]:
    """The layer of the first line that is about a decoder layer."""
    match = re.match(r"decoder\.layers\.(\d+)\.", next((line for line in lines if line.startswith("decoder.")), ""))
    layer = None if match is None else int(match[1])
    return {"where": "" if layer is None else f"layer {layer}", "layer": layer}


def _differences(stored: StoredWeights, name: str, weight: Weight, source: ModelSource, dtype: str) -> Iterator[str]:
    if name not in stored.file:
        yield f"{name} is missing"
        return
    found = stored.file[name]
    expected = _expected(stored, weight, dtype, found.dtype)
    if found.dtype != expected or found.shape != weight.shape:
        yield f"{name} is {found.dtype} {list(found.shape)}, expected {expected} {list(weight.shape)}"
        return
    flat, start, wrong, first = found.reshape(-1), 0, 0, 0
    for checkpoints in source.blocks(weight):
        block = _moved(stored, weight, checkpoints, start)
        unequal = np.flatnonzero(_bits(flat[start : start + block.size]) != _bits(block.reshape(-1).astype(expected)))
        if len(unequal) and not wrong:
            first = start + int(unequal[0])
        wrong += len(unequal)
        start += block.size
    if wrong:
        row = first * weight.shape[0] // found.size
        yield f"{name}: {wrong} of {found.size} elements differ, the first in row {row}"


def _moved(stored: StoredWeights, weight: Weight, block: Array, start: int) -> Array:
    """A block with the factors of AWQ in it that belong to its weight, a norm or gate."""
    if weight.views or (stored.folding.reads(weight.name) or stored.folding.makes(weight.name)) is None:
        return block
    return stored.folded(weight, block, start // max(1, math.prod(block.shape[1:])))


def _expected(stored: StoredWeights, weight: Weight, dtype: str, found: Any) -> Any:
    """The dtype of an unquantised tensor; rules of the recipe may choose either float for what need not be float32."""
    if weight.keep_float32 or not stored.islands.isdisjoint(weight.parameters()):
        return np.dtype(np.float32)
    chosen = stored.mixed and found in (np.dtype(np.float16), np.dtype(np.float32))
    return found if chosen else np.dtype(dtype)


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint32 if values.dtype == np.float32 else np.uint16)
