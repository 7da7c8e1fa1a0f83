"""The pass that turns layers whose weight is stored quantised into quantised nodes, and points these at the bytes.

`Gemm (transB = 1)` becomes QuantizedLinear (a bias becomes an Add behind it), ExpertDispatch becomes
QuantizedExpertDispatch. No other op has a quantised form, so a weight that one of them reads must not be quantised.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from moiie_export.graph.storage import Storage
from moiie_export.ops import DOMAIN
from moiie_export.ops.quantized_expert_dispatch import KINDS, PLAIN_BITS
from moiie_export.quantize.scheme import WEIGHT_ONLY, Scheme
from moiie_runtime.errors import MoiieError

Read = Mapping[ir.Value, Scheme]
"""The quantised weights among a node's inputs."""


def rewrite_quantized(model: ir.Model, storage: Storage, component: str) -> None:
    """Replace the nodes that read quantised weights, and the weights by what is stored.

    Args:
        model: bare nodes, initialisers without data.
        storage: where the weights are.
        component: its name, for messages.

    Raises:
        MoiieError: a quantised weight is read by an op that has no form for its format.
    """
    schemes: dict[ir.Value, Scheme] = {}
    for name, value in list(model.graph.initializers.items()):
        scheme = storage.scheme(name) if name in storage.parameters else None
        if scheme is not None:
            schemes[value] = scheme
            del model.graph.initializers[name]
    for node in list(model.graph) if schemes else ():
        read = {value: schemes[value] for value in node.inputs if value is not None and value in schemes}
        if not read:
            continue
        if _is_linear(node, read):
            _rewrite_linear(model, node, read, storage)
        elif _is_dispatch(node):
            _rewrite_dispatch(model, node, _weight_only(node, read, component), storage)
        else:
            raise _no_form(node, *next(iter(read.items())), component)


def _is_linear(node: ir.Node, read: Read) -> bool:
    attributes = node.attributes
    return (
        (node.domain, node.op_type) == ("", "Gemm")
        and attributes.get_float("alpha", 1.0) == 1 == attributes.get_float("beta", 1.0)
        and attributes.get_int("transA", 0) == 0
        and attributes.get_int("transB", 0) == 1
        and [index for index, value in enumerate(node.inputs) if value in read] == [1]
    )


def _is_dispatch(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, "ExpertDispatch")


def _weight_only(node: ir.Node, read: Read, component: str) -> Read:
    """Experts have no form that rounds activations."""
    for value, scheme in read.items():
        if scheme.format not in WEIGHT_ONLY:
            raise _no_form(node, value, scheme, component)
    return read


def _no_form(node: ir.Node, value: ir.Value, scheme: Scheme, component: str) -> MoiieError:
    return MoiieError(
        f"{component}: {value.name} is stored as {scheme.format}, for which node {node.name} ({node.op_type}) has no form",
        f"put a rule for {value.name} before the others, with format float16 or float32",
    )


def _rewrite_linear(model: ir.Model, node: ir.Node, read: Read, storage: Storage) -> None:
    weight, scheme = next(iter(read.items()))
    inputs = [node.inputs[0], *_stored(model, weight, scheme, storage)]
    attributes = {"bits": scheme.bits, "group_size": scheme.group_size}
    made = [ir.node("QuantizedLinear", inputs, attributes=attributes, domain=DOMAIN, name=node.name)]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        made[0].outputs[0].name = f"{node.outputs[0].name}.unbiased"
        made.append(ir.node("Add", [made[0].outputs[0], bias], name=f"{node.name}/bias"))
    _substitute(model, node, made)


def _rewrite_dispatch(model: ir.Model, node: ir.Node, read: Read, storage: Storage) -> None:
    experts = list(node.attributes["experts"].as_ints())
    attributes: dict[str, list[int]] = {"experts": experts}
    weights: list[ir.Value | None] = []
    scales: list[ir.Value] = []
    for index, kind in enumerate(KINDS):
        bits, sizes = [], []
        for bank in node.inputs[3 + index * len(experts) :][: len(experts)]:
            scheme = read.get(bank) if bank is not None else None
            bits.append(PLAIN_BITS if scheme is None else scheme.bits)
            sizes.append(0 if scheme is None else scheme.group_size)
            stored = [bank] if bank is None or scheme is None else _stored(model, bank, scheme, storage)
            weights.append(stored[0])
            scales += [value for value in stored[1:] if value is not None]
        attributes |= {f"{kind}_bits": bits, f"{kind}_group_sizes": sizes}
    inputs = [*node.inputs[:3], *weights, *scales]
    made = ir.node("QuantizedExpertDispatch", inputs, attributes=attributes, domain=DOMAIN, name=node.name)
    _substitute(model, node, [made])


def _stored(model: ir.Model, weight: ir.Value, scheme: Scheme, storage: Storage) -> list[ir.Value]:
    """Initialisers of a quantised weight; nodes that share it share them."""
    values = []
    for tensor in storage.quantized(str(weight.name), scheme):
        value = model.graph.initializers.get(str(tensor.name))
        if value is None:
            kind = ir.TensorType(tensor.dtype)
            value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=kind, const_value=tensor)
            model.graph.register_initializer(value)
        values.append(value)
    return values


def _substitute(model: ir.Model, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last takes over its output's name, type and readers."""
    for each in made:
        each.metadata_props.update(node.metadata_props)
    old, new = node.outputs[0], made[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    for index, output in enumerate(list(model.graph.outputs)):
        if output is old:
            model.graph.outputs[index] = new
    old.replace_all_uses_with(new)
    model.graph.insert_before(node, made)
    model.graph.remove(node, safe=True)
