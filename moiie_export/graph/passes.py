"""Passes over a traced graph, each small, in the order of `PORTABLE` below; weights are never loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import common

from moiie_export.graph.components import Component
from moiie_export.graph.deepen import scopes
from moiie_export.graph.quantized import rewrite_quantized
from moiie_export.graph.rewriting import ORIGIN
from moiie_export.graph.storage import Storage
from moiie_export.ops import DOMAIN, OPS
from moiie_export.ops.op import VERSION
from moiie_export.quantize.scheme import Scheme
from moiie_export.weights import WeightMap
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorInfo


@dataclass(frozen=True)
class PassContext:
    """What passes may read: the component, the weight map, where each weight lies in the weights file, and in which form.

    `schemes`: bundle tensor -> its form, for those that are quantised.
    """

    component: Component
    weight_map: WeightMap
    header: Mapping[str, TensorInfo]
    weights_file: str
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @cached_property
    def storage(self) -> Storage:
        """The weights file, as passes look at it."""
        return Storage(self.weight_map, self.header, self.weights_file, self.schemes)


def drop_probes(model: ir.Model, context: PassContext) -> None:
    """Probes stop being outputs but keep their value names, by which parity finds them again."""
    probes = {tensor.name for tensor in context.component.probes}
    kept = [value for value in model.graph.outputs if value.name not in probes]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)


def tidy(model: ir.Model, context: PassContext) -> None:
    """Merge equal nodes and constants, drop identities and what nothing reads."""
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def quantize_nodes(model: ir.Model, context: PassContext) -> None:
    """Layers whose weight is stored quantised become quantised nodes that point at its bytes.

    Raises:
        MoiieError: a quantised weight is read by an op that has no form for its format.
    """
    rewrite_quantized(model, context.storage, context.component.name)


def attach_weights(model: ir.Model, context: PassContext) -> None:
    """Point every other parameter at its bytes in the weights file; float16 is cast to float32 where it is used.

    Raises:
        MoiieError: an initialiser that is neither a parameter nor a small constant with data.
    """
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            continue
        if name not in context.storage.parameters:
            _require_data(name, value, context.component)
            continue
        tensor = context.storage.plain(name)
        if tensor.dtype == ir.DataType.FLOAT:
            value.const_value, value.dtype = tensor, tensor.dtype
        else:
            _cast_where_used(model, value, tensor)


def _require_data(name: str, value: ir.Value, component: Component) -> None:
    """A buffer made on the meta device has no data; the exporter would write zeros or fail much later."""
    try:
        data = value.const_value
        if data is None or data.nbytes > 1 << 20:
            raise ValueError("no data" if data is None else f"{data.nbytes} bytes")
        data.numpy()
    except Exception as error:
        raise MoiieError(
            f"{component.name}: initialiser {name} is no parameter of the weight map and has no data ({error})",
            "compute constants in forward(), or make them outside the meta device",
        ) from error


def _cast_where_used(model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor) -> None:
    name = str(value.name)
    stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    node = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}/Cast")
    node.outputs[0].name = f"{name}.float32"
    value.replace_all_uses_with(node.outputs[0])
    del model.graph.initializers[name]
    model.graph.register_initializer(stored)
    model.graph.insert_before(model.graph[0], node)


def strip_metadata(model: ir.Model, context: PassContext) -> None:
    """Remove what the exporter notes about the tracing machine (source lines, paths) and its symbolic shapes.

    Of all that, the name of each node's module stays.
    """
    model.producer_name, model.producer_version = "moiie-export", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = context.component.name
    boundary = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for node in model.graph:
        module = _module(node)
        node.metadata_props.clear()
        if module:
            node.metadata_props[ORIGIN] = module
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in boundary:
                value.shape = None
                value.type = None
    for value in boundary:
        value.metadata_props.clear()


def _module(node: ir.Node) -> str:
    """The innermost module that the exporter names for a node; empty where it names none."""
    module = next(reversed(scopes(node)), "")
    return "" if module.startswith("_") else module  # the exporter's word for "no module"


def check_attributes(model: ir.Model, context: PassContext) -> None:
    """Refuse attributes that an op's record does not list: parsers downstream ignore them without a word."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        unknown = set(node.attributes) ^ set(OPS[node.op_type].attributes)
        if unknown:
            raise MoiieError(
                f"{context.component.name}: node {node.name}: unexpected or missing attributes {sorted(unknown)}"
            )


def attach_bodies(model: ir.Model, _: PassContext | None = None) -> None:
    """Give every bare `moiie` node its portable body; nodes with different attributes get overloads of their own."""
    overloads: dict[str, list[str]] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        op = OPS[node.op_type]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        text = op.body(attributes, len(node.inputs))
        known = overloads.setdefault(op.name, [])
        if text not in known:
            known.append(text)
            function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
            overload = "" if len(known) == 1 else str(len(known))
            function.overload = overload
            model.functions[(DOMAIN, op.name, overload)] = function
        index = known.index(text)
        node.overload = "" if index == 0 else str(index + 1)
    model.opset_imports[DOMAIN] = VERSION


PORTABLE: tuple[Callable[[ir.Model, PassContext], None], ...] = (
    drop_probes,
    tidy,
    quantize_nodes,
    attach_weights,
    strip_metadata,
    check_attributes,
    attach_bodies,  # last: rewriting passes look for bare nodes
)
