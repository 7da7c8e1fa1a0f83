"""Put the bodies of functions in place of their calls, for parsers and passes that want a flat graph."""

from __future__ import annotations

import onnx_ir as ir

from moiie_export.graph.rewriting import replace
from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops import DOMAIN


def inline_bodies(model: ir.Model, context: TrtContext) -> None:
    """Replace `moiie` nodes that no plugin computes by the statements of their bodies."""
    for node in list(model.graph):
        if node.domain != DOMAIN or "plugin_namespace" in node.attributes:
            continue
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)
        else:
            _inline(model, node, _body(model, node, context))
    used = {(node.domain, node.op_type) for node in model.graph}
    for key in [key for key in model.functions if key[:2] not in used]:
        del model.functions[key]


def _body(model: ir.Model, node: ir.Node, context: TrtContext) -> ir.Function:
    """The function that was attached for this purpose, or the portable one of the bundle's graph."""
    body = model.functions.get((node.domain, node.op_type, "")) or context.bodies.get(str(node.name))
    if body is None:
        raise context.error(node, "the bundle's graph has no body for it", "export the bundle again")
    return body


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
