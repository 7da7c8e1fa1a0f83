"""Quantised layers -> our own CPU kernels (runtime/native), which read weights in one packed form for prefill and decode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from moiie_export.graph.rewriting import (
    fixed_sizes,
    initializer_for_later,
    insert,
    only_consumer,
    origin,
    producer,
    replace,
)
from moiie_export.ops import DOMAIN
from moiie_export.ops.quantized_expert_dispatch import KINDS, PLAIN_BITS
from moiie_runtime.engines import KERNELS

BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}
"""Bits of the types in which weights are stored."""


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight of the bundle, and the form a graph wants it in.

    Attributes:
        name: the parameter's name, in the bundle and in the engine.
        values, scales: where they lie in the bundle's weights file.
        rows, columns: N and K.
        bits, group_size: of the stored numbers.
        paired: for our kernels: whether the rows are [gate | up] whose SwiGLU they compute. None: for MatMulNBits.
    """

    name: str
    values: ir.ExternalTensor = field(compare=False, repr=False)
    scales: ir.ExternalTensor = field(compare=False, repr=False)
    rows: int
    columns: int
    bits: int
    group_size: int
    paired: bool | None


Plan = dict[str, PackedWeight]
"""Parameter -> how it is packed; one form serves all graphs."""


def lower_to_kernels(model: ir.Model, plan: Plan) -> None:
    """Replace QuantizedLinear and QuantizedExpertDispatch wherever the kernels have the form; fill the plan.

    fp8 and w8a8, which CPUs have no use for, keep their portable bodies.
    """
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == "QuantizedLinear" and _has_kernel(node):
            _linear(model, node, plan)
        elif node.op_type == "QuantizedExpertDispatch":
            _experts(model, node, plan)


def fuse_routing(model: ir.Model) -> None:
    """ModalityRouter and TopKRoute -> one kernel: a dozen small ops a layer would take a tenth of a decode step."""
    for node in list(model.graph):
        top = producer(node.inputs[0], "ModalityRouter") if node.op_type == "TopKRoute" else None
        if top is None:
            continue
        kernel = insert(
            node,
            "Route",
            top.inputs,
            domain=KERNELS,
            outputs=3,
            name=f"{node.name}/Route",
            top_k=node.attributes["top_k"].as_int(),
            **{name: attribute.value for name, attribute in top.attributes.items()},
        )
        for old, new in zip((top.outputs[0], *node.outputs), kernel.outputs, strict=True):
            replace(old, new)


def _has_kernel(node: ir.Node) -> bool:
    attributes = node.attributes
    grouped = attributes["group_size"].as_int() > 0 and attributes["bits"].as_int() in BITS.values()
    return grouped and (len(node.inputs) < 4 or node.inputs[3] is None)


def _linear(model: ir.Model, node: ir.Node, plan: Plan) -> None:
    bits, group = node.attributes["bits"].as_int(), node.attributes["group_size"].as_int()
    product = _swiglu(node.outputs[0])
    weight = _packed(model, (node.inputs[1], node.inputs[2]), (bits, group), product is not None, plan)
    biased = None if product is not None else _biased(node.outputs[0])
    bias = [] if biased is None else [value for value in biased.inputs if value is not node.outputs[0]]
    last = product or biased or node
    kernel = insert(
        last,
        "QLinear",
        [node.inputs[0], weight, *bias],
        domain=KERNELS,
        name=f"{node.name}/QLinear",
        N=plan[str(weight.name)].rows,
        K=plan[str(weight.name)].columns,
        bits=bits,
        group=group,
        swiglu=int(product is not None),
    )
    replace(last.outputs[0], kernel.outputs[0])


def _biased(product: ir.Value) -> ir.Node | None:
    """The addition of a bias behind a linear layer."""
    node = only_consumer(product, "Add")
    others = [] if node is None else [value for value in node.inputs if value is not product]
    is_bias = others and others[0] is not None and others[0].is_initializer() and len(others[0].shape or ()) == 1
    return node if is_bias else None


def _swiglu(gate_up: ir.Value) -> ir.Node | None:
    """The node that finishes silu(gate) * up of a value [rows, gate | up]; None when that is not what becomes of it."""
    readers = {use.node for use in gate_up.uses()}
    if not readers or any(node.op_type != "Slice" for node in readers):
        return None
    for node in _behind(readers):
        if node.op_type != "Sigmoid":
            continue
        silu = only_consumer(node.outputs[0], "Mul")
        product = None if silu is None else only_consumer(silu.outputs[0], "Mul")
        sides = [] if product is None else [*node.inputs, *product.inputs]
        made_of = {origin(value, ("Slice",)) for value in sides if silu is None or value is not silu.outputs[0]}
        if product is not None and made_of == {gate_up}:
            return product
    return None


def _behind(nodes: Iterable[ir.Node]) -> Iterable[ir.Node]:
    """The nodes that read what slices of slices give."""
    for node in nodes:
        readers = [use.node for use in node.outputs[0].uses()]
        yield from readers
        yield from _behind(each for each in readers if each.op_type == "Slice")


def _experts(model: ir.Model, node: ir.Node, plan: Plan) -> None:
    """One kernel call for the experts of each form; forms are summed. With an expert in floats it keeps its portable body."""
    attributes = {name: list(attribute.as_ints()) for name, attribute in node.attributes.items()}
    forms: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(attributes["experts"])):
        form = tuple(attributes[f"{kind}_{what}"][index] for kind in KINDS for what in ("bits", "group_sizes"))
        forms.setdefault(form, []).append(index)
    if any(PLAIN_BITS in (form[0], form[2]) or 0 in (form[1], form[3]) for form in forms):
        return
    banks = _banks(node, attributes)
    sums: list[ir.Value] = []
    for form, members in forms.items():
        weights = [
            _packed(model, banks[kind][index], form[2 * side : 2 * side + 2], side == 0, plan)
            for side, kind in enumerate(KINDS)
            for index in members
        ]
        gate_up, down = plan[str(weights[0].name)], plan[str(weights[-1].name)]
        kernel = insert(
            node,
            "QExperts",
            [*node.inputs[:3], *weights],
            domain=KERNELS,
            name=f"{node.name}/QExperts.{len(sums)}",
            H=gate_up.columns,
            I=down.columns,
            bits_gate_up=form[0],
            group_gate_up=form[1],
            bits_down=form[2],
            group_down=form[3],
            experts=[attributes["experts"][index] for index in members],
        )
        sums.append(kernel.outputs[0])
    total = sums[0]
    for number, value in enumerate(sums[1:]):
        total = insert(node, "Add", [total, value], name=f"{node.name}/sum.{number}").outputs[0]
    replace(node.outputs[0], total)


def _banks(node: ir.Node, attributes: dict[str, list[int]]) -> dict[str, list[tuple[ir.Value, ir.Value]]]:
    """kind -> (values, scales) of each expert; all of them are quantised."""
    count = len(attributes["experts"])
    given = [value for value in node.inputs[3:] if value is not None]
    return {
        kind: list(zip(given[side * count :][:count], given[(2 + side) * count :][:count], strict=True))
        for side, kind in enumerate(KINDS)
    }


def _packed(
    model: ir.Model, stored: tuple[ir.Value | None, ir.Value | None], form: tuple[int, ...], paired: bool, plan: Plan
) -> ir.Value:
    """The initialiser that will hold the packed weight; its bytes are pointed at when the engine's file is laid out."""
    values, scales = stored
    assert values is not None
    assert scales is not None
    stored_values, stored_scales = values.const_value, scales.const_value
    assert isinstance(stored_values, ir.ExternalTensor)
    assert isinstance(stored_scales, ir.ExternalTensor)
    rows, columns = fixed_sizes(stored_values.shape)
    weight = PackedWeight(str(values.name), stored_values, stored_scales, rows, columns, form[0], form[1], paired)
    if plan.setdefault(weight.name, weight) != weight:
        raise ValueError(f"{weight.name} is wanted in two forms")  # a graph of ours never does that
    return initializer_for_later(model, weight.name, ir.DataType.UINT8)
