"""Run a part of a graph while it is being rewritten, for tables that become constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession


def evaluate(
    model: ir.Model, values: Sequence[ir.Value], feeds: Mapping[str, npt.NDArray[np.generic]]
) -> list[npt.NDArray[np.float32]]:
    """The values, which must follow from `feeds` and small constants alone; computed by ONNX Runtime.

    Args:
        model: the graph.
        values: float32 values of it.
        feeds: graph inputs by name.
    """
    wanted, nodes = list(values), set()
    while wanted:
        node = wanted.pop().producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            wanted += [value for value in node.inputs if value is not None]
    needed = {value for node in nodes for value in node.inputs if value is not None}
    inputs = [value for value in model.graph.inputs if value in needed]
    constants = [_constant(value) for value in model.graph.initializers.values() if value in needed]
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in model.graph if node in nodes],
        "part",
        [ir.serde.serialize_value(value) for value in inputs],
        [onnx.helper.make_tensor_value_info(str(value.name), onnx.TensorProto.FLOAT, None) for value in values],
        constants,
    )
    part = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", model.opset_imports[""])], ir_version=model.ir_version
    )
    with OnnxRuntimeSession(part.SerializeToString(), component="tables", threads=1) as session:
        results = session.run({str(value.name): feeds[str(value.name)] for value in inputs})
    return [results[str(value.name)] for value in values]


def _constant(value: ir.Value) -> onnx.TensorProto:
    """The initialiser under the value's name, which its tensor need not have."""
    assert value.const_value is not None
    tensor = ir.serde.serialize_tensor(value.const_value)
    tensor.name = str(value.name)
    return tensor
