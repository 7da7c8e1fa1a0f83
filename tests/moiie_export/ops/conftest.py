"""One bare node with its portable body, run by ONNX Runtime: the second face of every op beside its torch reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moiie_export.graph.translation import register_schemas
from moiie_export.ops import DOMAIN, OPS
from moiie_export.ops.op import OPSET, VERSION

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
ELEMENTS = {"tensor(float)": TensorProto.FLOAT, "tensor(int32)": TensorProto.INT32, "tensor(int64)": TensorProto.INT64}
IR_VERSION = 10
"""The first with functions that have overloads."""

Run = Callable[..., list[np.ndarray]]


def single_node(
    name: str,
    attributes: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    stored: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A model of one bare node; all dimensions are dynamic. `stored`: inputs behind the others, as initialisers."""
    register_schemas()
    op = OPS[name]
    stored = stored or {}
    outputs = [port.name for port in op.outputs]
    node = helper.make_node(name, [*inputs, *stored], outputs, domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info(key, TYPES[value.dtype], [None] * value.ndim) for key, value in inputs.items()],
        # the body alone decides the rank of an output
        [onnx.ValueInfoProto(name=port.name, type=_element(ELEMENTS[port.type])) for port in op.outputs],
        [numpy_helper.from_array(array, key) for key, array in stored.items()],
    )
    function = onnx.parser.parse_function(op.body(attributes, len(node.input)))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=IR_VERSION)


def _element(kind: int) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = kind
    return proto


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session on one thread that is silent."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def run_body() -> Run:
    """run_body(op, attributes, {input: array}, {initialiser: array}) -> the outputs of the op's body in ONNX Runtime."""

    def run(
        name: str,
        attributes: Mapping[str, Any],
        inputs: Mapping[str, np.ndarray],
        stored: Mapping[str, np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        return list(session(single_node(name, attributes, inputs, stored)).run(None, dict(inputs)))

    return run


@pytest.fixture(scope="session")
def body_model() -> Callable[..., onnx.ModelProto]:
    """body_model(op, attributes, {input: array}) -> the model that run_body runs."""
    return single_node


@pytest.fixture(scope="session")
def body_session() -> Callable[..., onnxruntime.InferenceSession]:
    """body_session(op, attributes, {input: array}) -> its session, for IOBinding."""
    return lambda name, attributes, inputs: session(single_node(name, attributes, inputs))
