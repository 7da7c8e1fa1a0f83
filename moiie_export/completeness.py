"""Proof that every checkpoint tensor is used by exactly the graphs it should be, or cannot be reached.

What should be is derived from the config; what is, from the initialisers of the finished graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from moiie_export.families import family_of
from moiie_export.families.family import HOST
from moiie_export.model_config import ModelConfig
from moiie_export.weights import WeightMap
from moiie_runtime.errors import MoiieError


def prove(config: ModelConfig, weight_map: WeightMap, used: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """The manifest's `completeness` section.

    Args:
        config: the model.
        weight_map: parts of every weight.
        used: graph -> parameters among its initialisers.

    Returns:
        {"tensors": {checkpoint tensor: {"weight", "graphs", "rows"?}}, "unreachable": {checkpoint tensor: reason}}

    Raises:
        MoiieError: a graph uses a parameter that it should not, or lacks one that it should.
    """
    users: dict[str, set[str]] = {name: set() for name in weight_map.by_parameter()}
    for graph, parameters in used.items():
        for name in parameters:
            users[name].add(graph)
    for name, found in users.items():
        wanted = family_of(config).expected_users(name, config)
        if found | ({HOST} & wanted) != wanted:
            raise MoiieError(
                f"parameter {name}: expected in {sorted(wanted)}, found in {sorted(found)}",
                "the exported graphs are not the model; this is a defect of the exporter",
            )
    tensors: dict[str, Any] = {}
    for weight in weight_map.weights:
        start = 0
        for part in weight.parts:
            entry: dict[str, Any] = {"weight": weight.name, "graphs": _part_users(weight.parameters(), start, config)}
            if part.rows is not None:
                entry["rows"] = part.rows
            tensors[part.tensor] = entry
            start += prod(part.used_shape)
    return {"tensors": tensors, "unreachable": dict(weight_map.unreachable)}


def _part_users(parameters: Mapping[str, tuple[int, tuple[int, ...]]], start: int, config: ModelConfig) -> list[str]:
    """Users of the parameter that holds the part beginning `start` elements into its weight."""
    for name, (first, shape) in parameters.items():
        if first <= start < first + prod(shape):
            return sorted(family_of(config).expected_users(name, config))
    raise RuntimeError("a part lies outside its weight")
