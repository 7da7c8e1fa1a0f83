"""ExpertDispatch -> com.microsoft.MoE: one grouped product for all experts of a layer, without a word to the host.

What the op computes is exactly the dispatch, although it routes on its own: it takes router logits, and does softmax, top-k
and renormalisation. It is given the logarithm of each expert's weight, where `ExpertDispatch` has ids and weights: 0 for the
experts that a token does not go to, so their logit is far below all others. Then top-k finds the experts that were chosen,
softmax gives back their weights, and the modality rule needs no further thought. Weights that do not sum to 1 scale the
result. In float16 a logarithm is rounded, which costs a weight at most a step of float16 below 1; no route can change.

Prefill and decode read one stack, so that it lies on the GPU once, though a decode step never names a vision expert.

Why no other op: `QMoE` on CUDA reads weights in a layout of its own, made by a tool of that package; the raw layout, which
newer releases take, is tested upstream for finite results alone. So quantised experts are a loop of MatMulNBits
(cpu_contrib.py), whose result is defined by its documentation. The loop of the portable body, for experts whose sizes the op
does not take, asks the host for the number of rows of every expert.

Before ONNX Runtime 1.27 the op computed another SwiGLU on CUDA, whatever its attributes said (microsoft/onnxruntime#28738).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import (
    CONTRIB,
    constant,
    fixed_sizes,
    initializer_for_later,
    insert,
    producer,
    replace,
)
from moiie_export.graph.trt_context import exact
from moiie_export.ops import DOMAIN
from moiie_runtime.errors import MoiieError

OLDEST_RELEASE = "1.27"
"""Of ONNX Runtime, whose MoE computes what it is asked to."""
_ALIGNED, _SMALLEST = 8, 16
"""Sizes that the op takes are multiples of the one and not below the other."""
NOWHERE = 1e-37
"""Weight of an expert that a token does not go to; its logarithm is -85, in float16 too."""
_NAME = re.compile(r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Stack:
    """One weight of all experts of a layer, as MoE reads it: [experts, rows, columns].

    Attributes:
        name: of the initialiser, and in the engine's file.
        parts: what the bundle stores, one an expert, ascending by id.
        dtype: type on the device.
        paired: whether rows [gate | up] become gate, up, gate, up ...
    """

    name: str
    parts: tuple[ir.ExternalTensor, ...] = field(compare=False, repr=False)
    dtype: ir.DataType
    paired: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the stack."""
        return (len(self.parts), *fixed_sizes(self.parts[0].shape))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return prod(self.shape) * self.dtype.bitwidth // 8


Banks = dict[str, dict[int, tuple[ir.ExternalTensor, ir.ExternalTensor]]]
"""Experts of a layer by what their names begin with -> id -> gate_up and down."""


def find_banks(models: Iterable[ir.Model]) -> Banks:
    """The experts of every layer that any graph dispatches to."""
    banks: Banks = {}
    for model in models:
        for node in model.graph:
            if (node.domain, node.op_type) == (DOMAIN, "ExpertDispatch"):
                name, experts = _experts(node)
                banks.setdefault(name, {}).update(experts)
    return banks


def fuse_experts(model: ir.Model, banks: Banks, dtype: ir.DataType, islands: frozenset[str]) -> dict[str, Stack]:
    """Rewrite every ExpertDispatch whose sizes the op takes; the others compute in float32.

    Args:
        model: a graph with bare nodes, before its precision was changed.
        banks: of all graphs of the engine.
        dtype: what hidden states will be.
        islands: weights that stay float32, with what they multiply.

    Returns:
        The stacks that the graph reads, by name.
    """
    stacks: dict[str, Stack] = {}
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, "ExpertDispatch"):
            continue
        name = _experts(node)[0]
        first = next(iter(banks[name].values()))
        hidden, inner = fixed_sizes(first[1].shape)
        if any(size % _ALIGNED or size < _SMALLEST for size in (hidden, inner)):
            exact(node)
            continue
        wide = any(value is not None and value.name in islands for value in node.inputs)
        stacks |= _fuse(model, node, (name, banks[name]), ir.DataType.FLOAT if wide else dtype)
    return stacks


def _experts(node: ir.Node) -> tuple[str, dict[int, tuple[ir.ExternalTensor, ir.ExternalTensor]]]:
    """The layer's name and the experts of a node, by id."""
    ids = node.attributes["experts"].as_ints()
    tensors: list[ir.ExternalTensor] = []
    for value in node.inputs[3:]:
        tensor = None if value is None else value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            raise MoiieError(f"node {node.name}: an expert's weights lie in no file", "export the bundle again")
        tensors.append(tensor)
    match = _NAME.fullmatch(str(node.inputs[3].name)) if node.inputs[3] is not None else None
    if match is None:
        raise MoiieError(f"node {node.name}: its experts' names tell no layer", "export the bundle again")
    return match[1], dict(zip(ids, zip(tensors[: len(ids)], tensors[len(ids) :], strict=True), strict=True))


def _fuse(
    model: ir.Model,
    node: ir.Node,
    bank: tuple[str, dict[int, tuple[ir.ExternalTensor, ir.ExternalTensor]]],
    dtype: ir.DataType,
) -> dict[str, Stack]:
    name, experts = bank
    order = sorted(experts)
    suffix = dtype.name.lower()
    gate_up = Stack(f"{name}.gate_up_proj.paired.{suffix}", tuple(experts[each][0] for each in order), dtype, True)
    down = Stack(f"{name}.down_proj.{suffix}", tuple(experts[each][1] for each in order), dtype, False)
    weights = [initializer_for_later(model, each.name, dtype, each.shape) for each in (gate_up, down)]
    hidden, ids, shares = node.inputs[:3]
    assert ids is not None
    assert ids.shape is not None
    top_k = ids.shape[-1]
    assert isinstance(top_k, int)  # a graph's output, which has its sizes
    made = insert(
        node,
        "MoE",
        [hidden, _router_rows(model, node, order), weights[0], None, weights[1]],
        domain=CONTRIB,
        name=f"{node.name}/MoE",
        k=top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    if dtype == ir.DataType.FLOAT:
        exact(made)
    if producer(shares, "TopKRoute") is None:  # what that gives sums to 1
        axis = constant(model, "experts/slot_axis", np.array([-1], np.int64))
        total = insert(node, "ReduceSum", [shares, axis], name=f"{node.name}/total", keepdims=1)
        exact(total)
        made = insert(node, "Mul", [made.outputs[0], total.outputs[0]], name=f"{node.name}/scaled")
    replace(node.outputs[0], made.outputs[0])
    return {gate_up.name: gate_up, down.name: down}


def _router_rows(model: ir.Model, node: ir.Node, order: list[int]) -> ir.Value:
    """[T, experts]: the logarithm of each expert's weight for each token."""
    ids, shares = node.inputs[1:3]
    last = constant(model, "experts/slot_axis", np.array([-1], np.int64))
    columns = constant(model, f"experts/{'.'.join(map(str, order))}", np.array(order, np.int32))
    nothing = constant(model, "experts/nothing", np.array(0, np.float32))
    floor = constant(model, "experts/nowhere", np.array(NOWHERE, np.float32))
    slots = constant(model, "experts/slots", np.array([1], np.int64))

    def add(op: str, values: list[ir.Value | None], label: str, **attributes: int) -> ir.Value:
        made = insert(node, op, values, name=f"{node.name}/{label}", **attributes)
        exact(made)
        return made.outputs[0]

    hits = add("Equal", [add("Unsqueeze", [ids, last], "id"), columns], "hits")
    spread = add("Where", [hits, add("Unsqueeze", [shares, last], "weight"), nothing], "spread")
    weights = add("ReduceSum", [spread, slots], "weights", keepdims=0)
    return add("Log", [add("Max", [weights, floor], "floored")], "router")
