"""Which checkpoint tensors make up which bundle tensors, as data.

A bundle tensor is a concatenation of whole (or cut) checkpoint tensors along their first axis: fused projections and
expert stacks are nothing else in row-major memory, so the exporter streams them and nothing is transposed.
Every checkpoint tensor is either a part of some weight or unreachable with a reason; anything else is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from moiie_runtime.errors import MoiieError

Shape = tuple[int, ...]

CHECKPOINT, TOWER = "checkpoint", "vision_tower"
"""Where tensors come from: the checkpoint itself, or a vision tower with a directory of its own."""


@dataclass(frozen=True)
class Part:
    """One source tensor: where it comes from, its full shape, and how many leading rows are used (None: all)."""

    source: str
    tensor: str
    shape: Shape
    rows: int | None = None

    @property
    def used_shape(self) -> Shape:
        """Shape of the rows that are used."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])


@dataclass(frozen=True)
class Weight:
    """One tensor of the bundle.

    Attributes:
        name: its name in weights.safetensors.
        shape: its shape.
        parts: what it is made of, in order.
        keep_float32: stored as float32 whatever the bundle's dtype (norms, biases, router gates, positions).
        views: parameter name in the model -> index along the first axis, for stacks whose slices are parameters.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    keep_float32: bool = False
    views: Mapping[str, int] = field(default_factory=dict)

    def parameters(self) -> Mapping[str, tuple[int, Shape]]:
        """Model parameter -> (elements before it, its shape)."""
        if not self.views:
            return {self.name: (0, self.shape)}
        inner = self.shape[1:]
        return {name: (index * prod(inner), inner) for name, index in self.views.items()}


@dataclass(frozen=True)
class WeightMap:
    """All weights of a bundle, and the checkpoint tensors that no graph can reach with the reason for each."""

    weights: tuple[Weight, ...]
    unreachable: Mapping[str, str]

    def by_parameter(self) -> dict[str, tuple[Weight, int, Shape]]:
        """Model parameter -> (weight that holds it, elements before it, its shape)."""
        return {
            parameter: (weight, offset, shape)
            for weight in self.weights
            for parameter, (offset, shape) in weight.parameters().items()
        }


def check_tensors(weight_map: WeightMap, shapes: Mapping[str, Mapping[str, Shape]], where: Mapping[str, str]) -> None:
    """Compare the map with what the files hold.

    Args:
        weight_map: what the model needs.
        shapes: source -> tensor name -> shape, for every source the map reads.
        where: source -> directory, for messages.

    Raises:
        MoiieError: naming the first missing, misshapen or unknown tensor, and how many there are.
    """
    parts = [part for weight in weight_map.weights for part in weight.parts]
    missing = [part for part in parts if part.tensor not in shapes[part.source]]
    if missing:
        raise _missing(missing, where)
    for part in parts:
        found = shapes[part.source][part.tensor]
        if found != part.shape:
            raise _misshapen(part, found, where)
    used = {(part.source, part.tensor) for part in parts}
    unknown = [
        (source, tensor)
        for source, tensors in shapes.items()
        for tensor in tensors
        if (source, tensor) not in used and tensor not in weight_map.unreachable
    ]
    if unknown:
        source, tensor = unknown[0]
        raise MoiieError(
            f"{where[source]}: {len(unknown)} tensor(s) that this model does not have, the first: {tensor}",
            "config.json and the weights do not belong together, or the checkpoint holds a model we do not know",
        )


def _missing(missing: list[Part], where: Mapping[str, str]) -> MoiieError:
    gates = [part for part in missing if part.tensor.endswith((".gate.weight", ".gate_vis.weight"))]
    if gates and len(gates) == len(missing):
        return MoiieError(
            f"{where[gates[0].source]}: the checkpoint has experts but no router gates; missing {gates[0].tensor}"
            f" and {len(gates) - 1} more",
            "a converted checkpoint gets its gates by training or by `moiie upcycle`",
        )
    first = missing[0]
    return MoiieError(
        f"{where[first.source]}: {len(missing)} tensor(s) missing, the first: {first.tensor}, expected shape {list(first.shape)}",
        "the checkpoint is incomplete, or its config.json describes another model",
    )


def _misshapen(part: Part, found: Shape, where: Mapping[str, str]) -> MoiieError:
    hint = "config.json and the weights do not belong together"
    if part.tensor.endswith((".gate.weight", ".gate_vis.weight")):
        hint = (
            "a router gate has one row per expert its modality may reach, not one per expert;"
            " compare num_experts in config.json with how the checkpoint was trained"
        )
    if ".mm_projector." in part.tensor:
        hint = "the projector's width tells whether the model was trained with S2: compare use_s2 in config.json"
    return MoiieError(
        f"{where[part.source]}: {part.tensor}: expected shape {list(part.shape)}, found {list(found)}", hint
    )
