"""Deep graphs from a few traced layers: what tracing takes grows with the layers, and most of them are alike.

A stack of layers whose kinds repeat is traced three repetitions deep. The second one is then copied between itself and the
third, as often as the model is deeper, with the next layers' parameters, inputs and outputs. That is done only where the
third is the second node by node, so that nothing about a layer is assumed; where it is not, the whole stack is traced.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from moiie_export.graph.components import Component, Tensor

REPETITIONS = 3
"""One that also makes what all share, one to copy, and one to compare that with."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which the exporter names a node's modules, from the outermost to the innermost, and the node."""

_INDEXED = re.compile(r"(\w+)\.(\d+)(?=\.|$)(.*)")


@dataclass(frozen=True)
class Stack:
    """Layers of which some are enough.

    Attributes:
        path: of the module list, in the traced module.
        depth: how many there are.
        period: after how many their kinds repeat.
    """

    path: str
    depth: int
    period: int

    @property
    def traced(self) -> int:
        """How many are enough."""
        return REPETITIONS * self.period

    def moved(self, name: str, by: int) -> str:
        """The name that a layer's parameter, input or output has in the layer `by` further on; others stay."""
        inside = name.removeprefix(self.path + ".")
        if inside != name:
            index, _, rest = inside.partition(".")
            return f"{self.path}.{int(index) + by}.{rest}" if index.isdigit() else name
        match = _INDEXED.fullmatch(name)
        return name if match is None else f"{match[1]}.{int(match[2]) + by}{match[3]}"

    def layer(self, node: ir.Node) -> int | None:
        """The layer that a node belongs to."""
        own = (scope for scope in scopes(node) if scope.startswith(self.path + "."))
        index = next(own, "").removeprefix(self.path + ".").partition(".")[0]
        return int(index) if index.isdigit() else None


def scopes(node: ir.Node) -> list[str]:
    """The modules that the exporter names for a node, outermost first; none where it names none."""
    try:
        found = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return []
    return [str(scope) for scope in found[:-1]] if isinstance(found, list) else []


def find_stack(module: nn.Module, component: Component) -> Stack | None:
    """The stack of a component, if it is deep enough to be traced in part."""
    if not component.layers:
        return None
    layers = module.get_submodule(component.layers)
    assert isinstance(layers, nn.ModuleList)
    kinds = [(_kind(layer), _boundary(component, index)) for index, layer in enumerate(layers)]
    depth = len(kinds)
    period = next(p for p in range(1, depth + 1) if kinds[p:] == kinds[:-p])
    return Stack(component.layers, depth, period) if depth % period == 0 and depth > REPETITIONS * period else None


def _kind(layer: nn.Module) -> Any:
    """What distinguishes a layer: its modules with their settings, and its parameters' shapes."""
    modules = [
        (name, type(each), sorted((key, repr(value)) for key, value in vars(each).items() if key[0] != "_"))
        for name, each in layer.named_modules()
    ]
    return modules, [(name, each.shape, each.dtype) for name, each in layer.state_dict(keep_vars=True).items()]


def _boundary(component: Component, index: int) -> Any:
    """What a layer reads and writes of the graph's inputs and outputs."""
    found = []
    for group in (component.inputs, component.outputs, component.probes):
        for tensor in group:
            match = _INDEXED.fullmatch(tensor.name)
            if match is not None and int(match[2]) == index:
                found.append((match[1], match[3], tensor.dtype, tensor.dims))
    return found


@contextmanager
def cut(module: nn.Module, stack: Stack) -> Iterator[None]:
    """The module with the stack's first layers only."""
    parent, _, name = stack.path.rpartition(".")
    owner = module.get_submodule(parent)
    layers = owner.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    setattr(owner, name, layers[: stack.traced])
    try:
        yield
    finally:
        setattr(owner, name, layers)


def deepen(model: ir.Model, stack: Stack, component: Component) -> bool:
    """Make the graph of a whole stack from that of its first layers.

    Args:
        model: as traced of the stack cut short; changed in place.
        stack: the stack.
        component: of the whole model; the graph has its inputs and outputs afterwards.

    Returns:
        Whether it could be done. If not, the model is as before.
    """
    nodes = list(model.graph)
    starts = _starts(nodes, stack)
    if starts is None:
        return False
    pattern = _compare(nodes, starts, stack)
    if pattern is None:
        return False
    _Copies(model, nodes, pattern, stack).insert()
    named = {value.name: value for value in _values(model)}
    _refill(model.graph.inputs, component.inputs, named)
    _refill(model.graph.outputs, (*component.outputs, *component.probes), named)
    return True


def _starts(nodes: Sequence[ir.Node], stack: Stack) -> list[int] | None:
    """Where each layer begins; None unless they follow each other without coming back."""
    layers = [stack.layer(node) for node in nodes]
    order = [layer for layer in layers if layer is not None]
    if order != sorted(order) or set(order) != set(range(stack.traced)):
        return None
    return [layers.index(layer) for layer in range(stack.traced)]


@dataclass(frozen=True)
class _Pattern:
    """The nodes that are copied: [start, stop).

    Attributes:
        start, stop: the second repetition.
        carried: values made before it that come from the copy before in a copy -> what stands for them there.
        shared: values made before it that every copy reads.
        moved: initialisers and inputs that belong to its layers, in the order in which they are read.
    """

    start: int
    stop: int
    carried: dict[ir.Value, ir.Value] = field(default_factory=dict)
    shared: set[ir.Value] = field(default_factory=set)
    moved: dict[ir.Value, None] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """How many nodes."""
        return self.stop - self.start


def _compare(nodes: Sequence[ir.Node], starts: Sequence[int], stack: Stack) -> _Pattern | None:
    """The second repetition, if the third is the same in other layers."""
    pattern = _Pattern(starts[stack.period], starts[2 * stack.period])
    length, end = pattern.length, pattern.stop + pattern.length
    if end > len(nodes):
        return None
    place = {value: (index, number) for index, node in enumerate(nodes) for number, value in enumerate(node.outputs)}
    made = {value for node in nodes[pattern.start : pattern.stop] for value in node.outputs}

    def corresponds(one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is None or other is None:
            return one is other
        index, number = place.get(one, (-1, 0))
        if index < 0:
            if one is other:
                return stack.moved(str(one.name), 1) == one.name
            pattern.moved[one] = None
            return other not in place and other.name == stack.moved(str(one.name), stack.period)
        if one is other:
            pattern.shared.add(one)
            return index < pattern.start
        if index < pattern.start:
            pattern.carried[one] = other
        return index + length >= pattern.start and place.get(other) == (index + length, number)

    for one, other in zip(nodes[pattern.start : pattern.stop], nodes[pattern.stop : end], strict=True):
        if not _alike(one, other, stack) or not all(map(corresponds, one.inputs, other.inputs)):
            return None
    behind = (value for node in nodes[end:] for value in node.inputs)
    clear = pattern.shared.isdisjoint(pattern.carried) and not any(value in made for value in behind)
    return pattern if clear else None


def _alike(one: ir.Node, other: ir.Node, stack: Stack) -> bool:
    """Whether two nodes do the same, but for their inputs, and give outputs of the same names but for the layer."""
    kinds = [(node.domain, node.op_type, node.overload, len(node.inputs), len(node.outputs)) for node in (one, other)]
    places = [[stack.moved(scope + ".", stack.period) for scope in scopes(one)], [s + "." for s in scopes(other)]]
    names = [
        stack.moved(str(a.name), stack.period) == b.name
        for a, b in zip(one.outputs, other.outputs, strict=False)
        if a.is_graph_output() or b.is_graph_output()
    ]
    same = one.attributes.keys() == other.attributes.keys() and all(
        _same_attribute(attribute, other.attributes[name]) for name, attribute in one.attributes.items()
    )
    return kinds[0] == kinds[1] and places[0] == places[1] and all(names) and same


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    if one.type != other.type or one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if one.type != ir.AttributeType.TENSOR:
        return bool(one.value == other.value)
    tensors = [attribute.as_tensor() for attribute in (one, other)]
    same = tensors[0].dtype == tensors[1].dtype and tensors[0].shape == tensors[1].shape
    return same and np.array_equal(tensors[0].numpy(), tensors[1].numpy())


class _Copies:
    """Copies of the pattern, for the layers between it and the last ones."""

    def __init__(self, model: ir.Model, nodes: Sequence[ir.Node], pattern: _Pattern, stack: Stack) -> None:
        self._graph, self._pattern, self._stack = model.graph, pattern, stack
        self._nodes = nodes[pattern.start : pattern.stop]
        self._last = nodes[pattern.stop : pattern.stop + pattern.length]
        self._before = nodes[pattern.stop]

    def insert(self) -> None:
        """Put them there, and let the layers behind them follow the last one."""
        copies = self._stack.depth // self._stack.period - REPETITIONS
        self._rename_last(copies * self._stack.period)
        standing = {value: value for node in self._nodes for value in node.outputs}
        for number in range(1, copies + 1):
            standing = self._copy(number, standing)
        for node in self._last:
            for index, value in enumerate(node.inputs):
                if value in standing:
                    node.replace_input_with(index, standing[value])

    def _rename_last(self, by: int) -> None:
        """The last layers of those traced are the last ones of all."""
        for name in [self._stack.moved(str(value.name), self._stack.period) for value in self._pattern.moved]:
            parameter = self._graph.initializers.pop(name, None)
            value = parameter or next(each for each in self._graph.inputs if each.name == name)
            value.name = self._stack.moved(name, by)
            if parameter is not None:
                self._graph.register_initializer(parameter)
        for node in self._last:
            self._place(node, node, by)
            for value in node.outputs:
                if value.is_graph_output():
                    value.name = self._stack.moved(str(value.name), by)

    def _copy(self, number: int, before: Mapping[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value]:
        """One copy; returns what stands in it for each value that the pattern makes.

        Args:
            number: 1 for the first.
            before: the same of the copy before it.
        """
        by, made, moved = number * self._stack.period, dict[ir.Value, ir.Value](), dict[ir.Value, ir.Value]()

        def standing(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in made:
                return None if value is None else made[value]
            if value in self._pattern.carried:
                return before[self._pattern.carried[value]]
            if value in self._pattern.moved and value not in moved:
                moved[value] = self._moved(value, by)
            return moved.get(value, value)

        nodes = []
        for node in self._nodes:
            outputs = [self._output(value, by) for value in node.outputs]
            attributes = [ir.Attr(each.name, each.type, each.value) for each in node.attributes.values()]
            copy = ir.Node(
                node.domain,
                node.op_type,
                [standing(value) for value in node.inputs],
                attributes,
                overload=node.overload,
                outputs=outputs,
                name=f"{node.name}/{by}",
            )
            self._place(copy, node, by)
            made.update(zip(node.outputs, outputs, strict=True))
            nodes.append(copy)
        self._graph.insert_before(self._before, nodes)
        return made

    def _moved(self, value: ir.Value, by: int) -> ir.Value:
        """The parameter or input of another layer."""
        name = self._stack.moved(str(value.name), by)
        found = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        if value.name in self._graph.initializers:
            self._graph.register_initializer(found)
        else:
            self._graph.inputs.append(found)
        return found

    def _output(self, value: ir.Value, by: int) -> ir.Value:
        moved = self._stack.moved(str(value.name), by) if value.is_graph_output() else f"{value.name}/{by}"
        return ir.Value(name=moved, shape=value.shape, type=value.type)

    def _place(self, node: ir.Node, like: ir.Node, by: int) -> None:
        """Name the modules of a node after those of another, in layers further on."""
        names = [self._stack.moved(scope + ".", by)[:-1] for scope in scopes(like)]
        node.metadata_props[SCOPES] = repr([*names, ""])


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _refill(ends: Any, tensors: Sequence[Tensor], named: Mapping[str | None, ir.Value]) -> None:
    """The graph's inputs or outputs, in the component's order."""
    values = [named[tensor.name] for tensor in tensors]
    ends.clear()
    ends.extend(values)
