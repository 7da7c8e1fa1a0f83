"""TensorRT 10's list of ops: what is refused though the op is on it, and the forms that stand in for what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.defs
import onnx_ir as ir
import pytest

from moiie_export.graph.trt import lower
from moiie_export.graph.trt10_ops import TRT10_TYPES
from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_rules import TRT10_INT4_OPSET
from moiie_export.ops import DOMAIN
from moiie_runtime.errors import MoiieError
from tests.trt_graphs import target
from tests.trt_reference import run_dialect

FLOAT, HALF, INT8, INT4, INT64, BOOL = (
    ir.DataType[name] for name in ("FLOAT", "FLOAT16", "INT8", "INT4", "INT64", "BOOL")
)
ROWS, COLUMNS, GROUP = 6, 64, 32
Array = np.ndarray[Any, Any]


def value(name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def saved(
    path: Path, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], weights: Mapping[str, ir.TensorProtocol]
) -> Path:
    """A graph of these nodes, its weights beside it as in a bundle."""
    initializers = []
    for each in {each for node in nodes for each in node.inputs if each is not None and each.name in weights}:
        each.const_value = weights[str(each.name)]
        initializers.append(each)
    imports = {"": TRT10_INT4_OPSET, DOMAIN: 1}
    outputs = nodes[-1].outputs
    outputs[0].name = "out"
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=imports, name="g")
    ir.save(ir.Model(graph, ir_version=10), path / "g.onnx", external_data="g.data", size_threshold_bytes=0)
    return path / "g.onnx"


def lowered(path: Path, name: str) -> ir.Model:
    return lower(path, TrtContext("g", target(name, plugins="off", precision="float32")))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def one_node(op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> tuple[list[ir.Node], list[ir.Value]]:
    node = ir.node(op_type, inputs, attributes=attributes, name="n")
    node.outputs[0].shape, node.outputs[0].type = inputs[0].shape, ir.TensorType(FLOAT)
    return [node], list(inputs)


REFUSED: dict[str, tuple[Callable[[], tuple[list[ir.Node], list[ir.Value]]], str]] = {
    "whole numbers in Sqrt": (lambda: one_node("Sqrt", [value("x", INT64, [2])]), "int64 is no type that TensorRT 10"),
    "truths in Add": (lambda: one_node("Add", [value("x", BOOL, [2])] * 2), "bool is no type that TensorRT 10"),
    "choice between stored numbers": (
        lambda: one_node("Where", [value("c", BOOL, [2]), value("x", INT8, [2]), value("y", INT8, [2])]),
        "int8 is no type that TensorRT 10",
    ),
    "axes that are computed": (
        lambda: one_node("Squeeze", [value("x", FLOAT, [1, 2]), value("axes", INT64, [1])]),
        r"its input 1 \(axes\) has to be a constant",
    ),
    "reduction": (
        lambda: one_node(
            "ScatterND",
            [value("x", FLOAT, [2]), value("i", INT64, [1, 1]), value("u", FLOAT, [1])],
            reduction="add",
        ),
        "reduction = add has no lowering; expected none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_tensorrt_10_does_not_take_are_refused(tmp_path: Path, case: str) -> None:
    make, sentence = REFUSED[case]
    nodes, inputs = make()
    path = saved(tmp_path, nodes, list(dict.fromkeys(inputs)), {})
    with pytest.raises(MoiieError, match=rf"g: node n \({nodes[0].op_type}\): .*{sentence}"):
        lowered(path, "orin")


def test_a_scatter_that_reduces_nothing_loses_the_attribute(tmp_path: Path) -> None:
    inputs = [value("x", FLOAT, [2]), value("i", INT64, [1, 1]), value("u", FLOAT, [1])]
    nodes, inputs = one_node("ScatterND", inputs, reduction="none")
    (node,) = lowered(saved(tmp_path, nodes, inputs, {}), "orin").graph
    assert not node.attributes


@pytest.mark.parametrize("name", ["orin", "server", "rtx"])
def test_truths_are_compared_without_equal(tmp_path: Path, name: str) -> None:
    inputs = [value("x", BOOL, [4]), value("y", BOOL, [4])]
    node = ir.node("Equal", inputs, name="n")
    node.outputs[0].shape, node.outputs[0].type = ir.Shape([4]), ir.TensorType(BOOL)
    model = lowered(saved(tmp_path, [node], inputs, {}), name)
    assert kinds(model) == ["Xor", "Not"]
    ir.save(model, tmp_path / "made.onnx")
    truths = {"x": np.array([0, 0, 1, 1], bool), "y": np.array([0, 1, 0, 1], bool)}
    assert run_dialect(tmp_path / "made.onnx", truths)["out"].tolist() == [True, False, False, True]


def quantized(path: Path, dtype: ir.DataType) -> tuple[Path, Array, Array]:
    """A QuantizedLinear in groups, an input for it, and its result in float64."""
    rng = np.random.default_rng(0)
    limit = 7 if dtype == INT4 else 127
    stored = rng.integers(-limit, limit, (ROWS, COLUMNS)).astype(np.int8)
    scales = (rng.random((ROWS, COLUMNS // GROUP)) / limit + 0.01).astype(np.float16)
    x = rng.standard_normal((3, COLUMNS)).astype(np.float32)
    weights: dict[str, ir.TensorProtocol] = {
        "w": ir.Tensor(stored.astype(dtype.numpy()), dtype=dtype, name="w"),
        "w.scales": ir.Tensor(scales, name="w.scales"),
    }
    inputs = [value("x", FLOAT, x.shape), value("w", dtype, stored.shape), value("w.scales", HALF, scales.shape)]
    attributes = {"bits": 4 if dtype == INT4 else 8, "group_size": GROUP}
    node = ir.node("QuantizedLinear", inputs, attributes=attributes, domain=DOMAIN, name="n")
    node.outputs[0].shape, node.outputs[0].type = ir.Shape([3, ROWS]), ir.TensorType(FLOAT)
    restored = stored.astype(np.float64) * np.repeat(scales, GROUP, axis=1)
    return saved(path, [node], inputs[:1], weights), x, x @ restored.T


@pytest.mark.parametrize("dtype", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("name", ["orin", "rtx"])
def test_groups_of_stored_numbers(tmp_path: Path, name: str, dtype: ir.DataType) -> None:
    """TensorRT 10 has blocks of int4 only: int8 has a row and a scale for each group, and the same result.

    For RTX, int8 waits for the rows: TensorRT would make copies of all layers' at once.
    """
    path, x, wanted = quantized(tmp_path, dtype)
    model = lowered(path, name)
    blocks = name == "rtx" or dtype == INT4
    waits = ["Greater", "Cast", "ReduceMax", "Greater", "Where"] if (name, dtype) == ("rtx", INT8) else []
    assert kinds(model) == ["DequantizeLinear", *([] if blocks else ["Reshape"]), "Transpose", *waits, "MatMul"]
    (node, *_) = model.graph
    weight, scales = (each for each in node.inputs if each is not None)
    assert weight.dtype == dtype
    if not blocks:
        assert list(weight.shape or ()) == [ROWS * COLUMNS // GROUP, GROUP]
        assert list(scales.shape or ()) == [ROWS * COLUMNS // GROUP]
        assert model.opset_imports[""] == 20
    ir.save(model, tmp_path / "made.onnx", external_data="made.data")
    np.testing.assert_allclose(run_dialect(tmp_path / "made.onnx", {"x": x})["out"], wanted, rtol=1e-5, atol=1e-5)
    x[0], x[1, 0], x[2] = np.nan, np.inf, -x[2]
    found = run_dialect(tmp_path / "made.onnx", {"x": x})["out"]
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[2], -wanted[2], rtol=1e-5, atol=1e-5, err_msg="a lost row takes no other with it")


def test_blocks_of_int8_are_refused(tmp_path: Path) -> None:
    weights: dict[str, ir.TensorProtocol] = {
        "w": ir.Tensor(np.ones((ROWS, COLUMNS), np.int8), name="w"),
        "s": ir.Tensor(np.ones((ROWS, COLUMNS // GROUP), np.float32), name="s"),
    }
    inputs = [value(name, tensor.dtype, tensor.shape.numpy()) for name, tensor in weights.items()]
    nodes, _ = one_node("DequantizeLinear", inputs, axis=1, block_size=GROUP)
    with pytest.raises(MoiieError, match="TensorRT 10 has no blocks of int8"):
        lowered(saved(tmp_path, nodes, [], weights), "orin")


def test_every_listed_op_is_one_of_onnx() -> None:
    for name in TRT10_TYPES:
        assert onnx.defs.get_schema(name, TRT10_INT4_OPSET).since_version <= TRT10_INT4_OPSET
