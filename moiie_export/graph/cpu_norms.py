"""RMSNormalization -> ONNX Runtime's fused norms, which add the residual and normalise in one pass over memory."""

from __future__ import annotations

import onnx_ir as ir

from moiie_export.graph.rewriting import CONTRIB, insert, producer, replace


def fuse_norms(model: ir.Model) -> None:
    """Replace each RMSNormalization over the last axis; where it follows an addition, that becomes part of it."""
    for node in list(model.graph):
        if node.op_type != "RMSNormalization" or node.attributes["axis"].as_int() != -1:
            continue
        source, weight = node.inputs
        epsilon = node.attributes["epsilon"].as_float()
        added = producer(source, "Add")
        if added is not None and _same_shape_sum(added):
            fused = insert(
                node,
                "SkipSimplifiedLayerNormalization",
                [*added.inputs, weight],
                domain=CONTRIB,
                outputs=4,
                name=f"{node.name}/skip",
                epsilon=epsilon,
            )
            replace(node.outputs[0], fused.outputs[0])
            replace(added.outputs[0], fused.outputs[3])
            continue
        plain = insert(
            node,
            "SimplifiedLayerNormalization",
            [source, weight],
            name=f"{node.name}/simplified",
            axis=-1,
            epsilon=epsilon,
            stash_type=1,
        )
        replace(node.outputs[0], plain.outputs[0])


def _same_shape_sum(node: ir.Node) -> bool:
    """Whether both sides are computed: the residual stream never adds a constant."""
    return all(value is not None and value.const_value is None for value in node.inputs)
