"""The graphs' inputs and outputs against what this checkpoint's model demands of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch

from moiie_export.graph.components import Component, Tensor
from moiie_export.parity.bisect_graphs import load_graph as read_graph
from moiie_export.parity.report import Check, tell
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.bundle import Bundle

Specs = dict[str, TensorSpec]


def load_graph(bundle: Bundle, component: Component) -> onnx.ModelProto:
    """The parsed graph, without its weights.

    Raises:
        Unsound: the file is missing or not an ONNX model.
    """
    return read_graph(bundle.path(component.file), "export the bundle again")


def check_interface(bundle: Bundle, component: Component, model: onnx.ModelProto) -> list[Check]:
    """Names, then shapes, then dtypes of a graph's inputs, outputs and probes, each as one check."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    sides = {
        "input": (_wanted(component.inputs), {v.name: _spec(v) for v in graph.input if v.name not in weights}),
        "output": (_wanted(component.outputs), {value.name: _spec(value) for value in graph.output}),
    }
    manifest = bundle.components.get(component.name)
    recorded = {"input": manifest.inputs, "output": manifest.outputs} if manifest else {}
    made = {name for node in graph.node for name in node.output}
    names = [
        *(line for side, (wanted, found) in sides.items() for line in _name_differences(side, wanted, found)),
        *(f"no value {probe.name} inside the graph" for probe in component.probes if probe.name not in made),
    ]
    place: dict[str, Any] = {"where": component.name}
    return [
        tell("names", names, **place, layer=_first_layer(names)),
        tell("shapes", lines := list(_differences(sides, "shape")), **place, layer=_first_layer(lines)),
        tell("dtypes", lines := list(_differences(sides, "dtype")), **place, layer=_first_layer(lines)),
        tell("manifest signatures", list(_recorded_differences(sides, recorded)), **place),
    ]


def _wanted(tensors: tuple[Tensor, ...]) -> Specs:
    names = {torch.float32: "float32", torch.int32: "int32", torch.int64: "int64"}
    return {tensor.name: TensorSpec(names[tensor.dtype], tensor.dims) for tensor in tensors}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    types: dict[int, str] = {
        int(onnx.TensorProto.FLOAT): "float32",
        int(onnx.TensorProto.INT32): "int32",
        int(onnx.TensorProto.INT64): "int64",
    }
    return TensorSpec(types.get(tensor.elem_type, f"type {tensor.elem_type}"), dims)


def _name_differences(side: str, wanted: Specs, found: Specs) -> Iterator[str]:
    for name in wanted:
        if name not in found:
            yield f"{side} {name} is missing"
    for name in found:
        if name not in wanted:
            yield f"{side} {name} is not one of the checkpoint's model"


def _differences(sides: Mapping[str, tuple[Specs, Specs]], what: str) -> Iterator[str]:
    for side, (wanted, found) in sides.items():
        for name in wanted:
            if name not in found:
                continue
            expected, actual = getattr(wanted[name], what), getattr(found[name], what)
            if expected != actual:
                yield f"{side} {name} is {_shown(actual)}, expected {_shown(expected)}"


def _recorded_differences(
    sides: Mapping[str, tuple[Specs, Specs]], recorded: Mapping[str, Mapping[str, TensorSpec]]
) -> Iterator[str]:
    """Where the manifest says something else than the graph itself."""
    for side, (_, found) in sides.items():
        said = recorded.get(side, {})
        for name in {**found, **said}:
            if said.get(name) != found.get(name):
                yield f"{side} {name}: bundle.json says {said.get(name)}, the graph {found.get(name)}"


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _first_layer(lines: list[str]) -> int | None:
    """The lowest layer that the lines name, as in `present.4.key`."""
    found = [int(match) for line in lines for match in re.findall(r"[a-z]\.(\d+)\b", line)]
    return min(found, default=None)
