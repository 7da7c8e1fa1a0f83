"""Small tools for passes that replace one form of a computation by another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own ops."""

ORIGIN = "torch"
"""Metadata of a node: the module of the reference model that it comes from."""


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, when it is of one of these types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def origin(value: ir.Value | None, through: Iterable[str]) -> ir.Value | None:
    """What a value was made of: first inputs are followed through nodes of these types."""
    passed = {*through}
    while value is not None and (node := value.producer()) is not None and node.op_type in passed:
        value = node.inputs[0]
    return value


def only_consumer(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that reads a value, when it is of one of these types and the value is no output of the graph."""
    nodes = {use.node for use in value.uses()}
    if len(nodes) != 1 or value.is_graph_output():
        return None
    node = next(iter(nodes))
    return node if node.op_type in op_types else None


def insert(before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **options: Any) -> ir.Node:
    """A new node in front of another.

    Args:
        before: where it goes.
        op_type: its type.
        inputs: its inputs; None for one that is left out.
        options: `domain`, `outputs` (their number, 1 unless said), `name` (also of its first output), and attributes.
    """
    domain, count, name = options.pop("domain", ""), options.pop("outputs", 1), options.pop("name", None)
    node = ir.node(op_type, inputs, attributes=options, domain=domain, num_outputs=count, name=name)
    if name is not None:
        for index, output in enumerate(node.outputs):
            output.name = name if index == 0 else f"{name}.{index}"
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node


def constant(model: ir.Model, name: str, array: Any) -> ir.Value:
    """A small initialiser; one of the same name is taken for the same."""
    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    shape = ir.Shape(np.asarray(array).shape)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def fixed_sizes(shape: ir.Shape | None) -> tuple[int, ...]:
    """A shape without named dimensions."""
    assert shape is not None
    return tuple(size for size in shape if isinstance(size, int))


def initializer_for_later(model: ir.Model, name: str, dtype: ir.DataType, shape: Sequence[int] = ()) -> ir.Value:
    """An initialiser, in the place of one of the same name, whose bytes `is_for_later` until they have been written."""
    known = model.graph.initializers.get(name)
    if known is not None and is_for_later(known):
        return known
    model.graph.initializers.pop(name, None)
    tensor = ir.ExternalTensor("", 0, 0, dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def is_for_later(value: ir.Value) -> bool:
    """Whether a value has no bytes yet."""
    return isinstance(value.const_value, ir.ExternalTensor) and not str(value.const_value.location)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads `old` read `new`, the graph's outputs too, which keep their name.

    A value that was just made takes over the old one's name, by which parity finds it again.
    """
    graph = old.graph
    if new.producer() is not None and not new.uses() and not new.is_graph_output() and not old.is_graph_output():
        old.name, new.name = f"{old.name}.replaced", old.name
    if graph is not None and old.is_graph_output():
        name, shape, kind = old.name, old.shape, old.type
        for index, output in enumerate(list(graph.outputs)):
            if output is old:
                graph.outputs[index] = new
        old.name, new.name, new.shape, new.type = f"{name}.replaced", name, shape, kind
    old.replace_all_uses_with(new)


def clean(model: ir.Model) -> None:
    """Drop what nothing reads any more, merge what is equal, and put nodes in an order in which they can run."""
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.TopologicalSortPass()(model)
