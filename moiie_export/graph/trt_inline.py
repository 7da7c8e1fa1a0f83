"""Put the bodies of functions in place of their calls, for parsers and passes that want a flat graph."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from moiie_export.graph.rewriting import replace
from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops import DOMAIN, OPS


def inline_bodies(model: ir.Model, context: TrtContext) -> None:
    """Replace `moiie` nodes that no plugin computes by the statements of their bodies."""
    for node in list(model.graph):
        if node.domain == DOMAIN and "plugin_namespace" not in node.attributes:
            _inline(model, node, _body(model, node))
    used = {(node.domain, node.op_type) for node in model.graph}
    for key in [key for key in model.functions if key[:2] not in used]:
        del model.functions[key]


def _body(model: ir.Model, node: ir.Node) -> ir.Function:
    """The function that was attached for this purpose, or the op's portable one."""
    attached = model.functions.get((node.domain, node.op_type, ""))
    if attached is not None:
        return attached
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return ir.serde.deserialize_function(
        onnx.parser.parse_function(OPS[node.op_type].body(attributes, len(node.inputs)))
    )


def _inline(model: ir.Model, call: ir.Node, body: ir.Function) -> None:
    mapped: dict[ir.Value | None, ir.Value | None] = {None: None}
    mapped.update(zip(body.inputs, call.inputs, strict=False))
    for inner in body:
        node = ir.Node(
            inner.domain,
            inner.op_type,
            [mapped[value] for value in inner.inputs],
            [_attribute(each, call) for each in inner.attributes.values()],
            num_outputs=len(inner.outputs),
            name=f"{call.name}/{inner.outputs[0].name}",
        )
        for old, new in zip(inner.outputs, node.outputs, strict=True):
            new.name = f"{call.name}/{old.name}"
            mapped[old] = new
        model.graph.insert_before(call, node)
    for outer, output in zip(call.outputs, body.outputs, strict=True):
        result = mapped[output]
        assert result is not None
        replace(outer, result)
    model.graph.remove(call, safe=True)


def _attribute(attribute: ir.Attr, call: ir.Node) -> ir.Attr:
    """The attribute, or what the call gives for one that refers to it."""
    if not attribute.is_ref():
        return attribute
    given = call.attributes[str(attribute.ref_attr_name)]
    return ir.Attr(attribute.name, given.type, given.value)
