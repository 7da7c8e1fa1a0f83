"""What the TensorRT passes know about the graph they rewrite, and the marks they leave on nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from moiie_export.targets import Target
from moiie_runtime.errors import MoiieError

EXACT = "moiie.float32"
"""Mark on a node that computes in float32 in every precision: routing, angles, statistics."""


@dataclass(frozen=True)
class Bank:
    """The experts of one layer that are bound, and leave memory, together.

    Attributes:
        layer: index of the decoder layer.
        name: `language` (what a decode step can reach) or `vision` (the others).
        experts: global ids, ascending; one row of each tensor an expert.
        tensors: engine input -> what the bundle stores, one an expert, in order.
    """

    layer: int
    name: str
    experts: tuple[int, ...]
    tensors: dict[str, tuple[ir.TensorProtocol, ...]]


@dataclass
class TrtContext:
    """One component on its way to an engine.

    Attributes:
        component: its name in the bundle.
        target: gives dialect, precision, plugins, banks and batch.
        decode_experts: global ids that a decode step can reach, by layer.
        islands: names of weights whose linear layers stay float32.
        banks: filled by the passes: experts that became inputs.
        bodies: filled by the passes: node -> the portable body that the bundle gives it.
        attention: filled by the passes: how decoder attention is masked, `lower_right`, `mask`, or "" without any.
        counted_attention: filled too: TRT_Attention nodes that are told how many keys there are.
        aliases: filled by the passes: output -> input that shares its buffer.
        inputs, outputs: filled by the builder: name -> name, dtype and shape, as manifests say it.
    """

    component: str
    target: Target
    decode_experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    islands: frozenset[str] = frozenset()
    banks: list[Bank] = field(default_factory=list)
    bodies: dict[str, ir.Function] = field(default_factory=dict)
    attention: str = ""
    counted_attention: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def standard(self) -> bool:
        """Whether the dialect has standard ops only, of a release that TensorRT 10.3 reads."""
        return self.target.dialect == "trt10"

    def error(self, node: ir.Node, what: str, hint: str | None = None) -> MoiieError:
        """An error about a node."""
        return MoiieError(f"{self.component}: node {node.name} ({node.op_type}): {what}", hint)


def exact(*nodes: ir.Node) -> None:
    """Mark nodes to compute in float32."""
    for node in nodes:
        node.metadata_props[EXACT] = "1"


def is_exact(node: ir.Node) -> bool:
    """Whether a node is marked."""
    return EXACT in node.metadata_props


def graph_input(model: ir.Model, name: str, context: TrtContext) -> ir.Value:
    """The graph input of this name."""
    for value in model.graph.inputs:
        if value.name == name:
            return value
    raise MoiieError(f"{context.component}: the graph has no input {name}", "export the bundle again")
