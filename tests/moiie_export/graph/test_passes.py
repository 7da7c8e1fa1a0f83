"""Each pass on a graph of a few nodes, before and after; and what passes must refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moiie_export.graph import passes
from moiie_export.graph.components import Component, Tensor
from moiie_export.graph.passes import PORTABLE, PassContext
from moiie_export.ops.op import OPSET
from moiie_export.ops.topk_route import topk_route
from moiie_export.weights import Part, Weight, WeightMap
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import read_header, save_tensors

FLOAT = ir.DataType.FLOAT


def component(*probes: str) -> Component:
    return Component("small", None, (), (), tuple(Tensor(name, torch.float32, (2,)) for name in probes), tuple)  # type: ignore[arg-type]


def context(*probes: str, weights: tuple[Weight, ...] = (), header: Any = None) -> PassContext:
    return PassContext(component(*probes), WeightMap(weights, {}), header or {}, "weights.safetensors")


def value(name: str, *shape: int, dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def node(op: str, inputs: list[ir.Value], output: str, domain: str = "", **attributes: Any) -> ir.Node:
    made = ir.node(op, inputs, attributes=attributes, domain=domain, name=f"node_{output}")
    made.outputs[0].name = output
    return made


def model(
    inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node], weights: list[ir.Value] | None = None
) -> ir.Model:
    opsets = {"": OPSET, "moiie": 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights or [], opset_imports=opsets, name="main_graph")
    return ir.Model(graph, ir_version=10)


def ops(graph: ir.Model) -> list[str]:
    return [item.op_type for item in graph.graph]


def test_passes_are_in_an_order_that_ends_with_bodies() -> None:
    names = [each.__name__ for each in PORTABLE]
    weights = ["quantize_nodes", "attach_weights"]
    assert names == ["drop_probes", "tidy", *weights, "strip_metadata", "check_attributes", "attach_bodies"]


def test_probes_stop_being_outputs_and_keep_their_names() -> None:
    x = value("x", 2)
    hidden = node("Relu", [x], "hidden.0")
    logits = node("Neg", [hidden.outputs[0]], "logits")
    graph = model([x], [logits.outputs[0], hidden.outputs[0]], [hidden, logits])
    passes.drop_probes(graph, context("hidden.0"))
    assert [output.name for output in graph.graph.outputs] == ["logits"]
    passes.tidy(graph, context("hidden.0"))
    assert [item.outputs[0].name for item in graph.graph] == ["hidden.0", "logits"]


def test_tidy_merges_equal_nodes_and_drops_identities_and_what_nothing_reads() -> None:
    x = value("x", 2)
    first, second = node("Relu", [x], "a"), node("Relu", [x], "b")
    identity = node("Identity", [second.outputs[0]], "c")
    total = node("Add", [first.outputs[0], identity.outputs[0]], "y")
    unread = node("Neg", [x], "unread")
    graph = model([x], [total.outputs[0]], [first, second, identity, total, unread])
    passes.tidy(graph, context())
    assert ops(graph) == ["Relu", "Add"]
    assert [v.name for v in graph.graph[1].inputs if v is not None] == ["a", "a"]


def test_tidy_merges_custom_nodes_only_with_equal_attributes() -> None:
    x = value("x", 2, 4)
    routes = [node("TopKRoute", [x], f"r{i}", "moiie", top_k=k) for i, k in enumerate((1, 1, 2))]
    graph = model([x], [], routes)
    sums = [node("Neg", [route.outputs[0]], f"y{i}") for i, route in enumerate(routes)]
    graph.graph.extend(sums)
    graph.graph.outputs.extend(item.outputs[0] for item in sums)
    passes.tidy(graph, context())
    assert ops(graph).count("TopKRoute") == 2


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Any]:
    """A weights file with a vector, a stack of two experts and a float16 matrix."""
    path = tmp_path / "weights.safetensors"
    tensors = {
        "norm.weight": np.arange(3, dtype=np.float32),
        "experts.down": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "head.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    }
    save_tensors(path, tensors)
    return path, read_header(path)


WEIGHTS = (
    Weight("norm.weight", (3,), (Part("checkpoint", "n", (3,)),)),
    Weight(
        "experts.down",
        (2, 2, 3),
        (Part("checkpoint", "e0", (2, 3)), Part("checkpoint", "e3", (2, 3))),
        views={"experts.0.down": 0, "experts.3.down": 1},
    ),
    Weight("head.weight", (2, 3), (Part("checkpoint", "h", (2, 3)),)),
)


def weighted() -> ir.Model:
    """x * norm, through the second expert and the head, as the exporter leaves it: initialisers without data."""
    x, norm, expert, head = (
        value("x", 4, 3),
        value("norm.weight", 3),
        value("experts.3.down", 2, 3),
        value("head.weight", 2, 3),
    )
    scaled = node("Mul", [x, norm], "scaled")
    routed = node("Gemm", [scaled.outputs[0], expert], "routed", transB=1)
    logits = node("Gemm", [scaled.outputs[0], head], "logits", transB=1)
    both = node("Add", [routed.outputs[0], logits.outputs[0]], "y")
    both.outputs[0].shape, both.outputs[0].type = ir.Shape([4, 2]), ir.TensorType(FLOAT)
    return model([x], [both.outputs[0]], [scaled, routed, logits, both], [norm, expert, head])


def test_parameters_point_at_their_bytes(stored: tuple[Path, Any]) -> None:
    path, header = stored
    graph = weighted()
    passes.attach_weights(graph, context(weights=WEIGHTS, header=header))
    tensors = {name: item.const_value for name, item in graph.graph.initializers.items()}
    offsets = {name: (t.offset, t.length) for name, t in tensors.items() if isinstance(t, ir.ExternalTensor)}
    assert offsets == {
        "norm.weight": (header["norm.weight"].offset, 12),
        "experts.3.down": (header["experts.down"].offset + 24, 24),
        "head.weight": (header["head.weight"].offset, 12),
    }
    blob = path.read_bytes()
    start, length = offsets["experts.3.down"]
    assert blob[start : start + length] == np.arange(6, 12, dtype=np.float32).tobytes()


def test_float16_storage_is_cast_where_it_is_used_and_computes_the_same(stored: tuple[Path, Any]) -> None:
    path, header = stored
    graph = weighted()
    passes.attach_weights(graph, context(weights=WEIGHTS, header=header))
    assert ops(graph) == ["Cast", "Mul", "Gemm", "Gemm", "Add"]
    cast = graph.graph[0]
    assert [v.name for v in (*cast.inputs, *cast.outputs) if v] == ["head.weight", "head.weight.float32"]
    assert graph.graph.initializers["head.weight"].dtype == ir.DataType.FLOAT16
    file = path.parent / "small.onnx"
    ir.save(graph, file)
    onnx.checker.check_model(str(file), full_check=True)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    found = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    scaled = x * np.arange(3, dtype=np.float32)
    expected = (
        scaled @ np.arange(6, 12, dtype=np.float32).reshape(2, 3).T
        + scaled @ np.arange(6, dtype=np.float32).reshape(2, 3).T
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(FLOAT), const_value=ir.tensor(array, name=name)
    )


def refusal(initialiser: ir.Value) -> MoiieError:
    x = value("x", 3)
    total = node("Mul", [x, initialiser], "y")
    with pytest.raises(MoiieError) as caught:
        passes.attach_weights(model([x], [total.outputs[0]], [total], [initialiser]), context())
    return caught.value


def test_an_initialiser_without_data_is_refused_by_name() -> None:
    error = refusal(value("tower.positions", 3))
    assert "small: initialiser tower.positions is no parameter of the weight map" in error.message
    assert "meta" in str(error.hint)


def test_a_large_constant_that_is_no_parameter_is_refused_by_name() -> None:
    error = refusal(constant("mask", np.zeros((513, 512), np.float32)))
    assert "initialiser mask" in error.message
    assert "1050624 bytes" in error.message


def test_a_small_constant_stays() -> None:
    x, small = value("x", 3), constant("small", np.ones(3, np.float32))
    total = node("Mul", [x, small], "y")
    graph = model([x], [total.outputs[0]], [total], [small])
    passes.attach_weights(graph, context())
    assert list(graph.graph.initializers) == ["small"]


def test_what_the_exporter_notes_is_removed() -> None:
    x = value("x", 2)
    first = node("Relu", [x], "a")
    last = node("Neg", [first.outputs[0]], "y")
    last.outputs[0].shape, last.outputs[0].type = ir.Shape(["n"]), ir.TensorType(FLOAT)
    first.outputs[0].shape, first.outputs[0].type = ir.Shape(["s0"]), ir.TensorType(FLOAT)
    graph = model([x], [last.outputs[0]], [first, last])
    graph.producer_name, graph.producer_version = "pytorch", "2"
    for holder in (graph, graph.graph, first, first.outputs[0], x):
        holder.metadata_props["pkg.torch.stack_trace"] = 'File "/home/someone/model.py"'
    first.doc_string = "/home/someone"
    passes.strip_metadata(graph, context())
    assert (graph.producer_name, graph.producer_version, graph.graph.name) == ("moiie-export", None, "small")
    assert b"/home" not in ir.to_proto(graph).SerializeToString()
    assert first.outputs[0].shape is None
    assert first.outputs[0].type is None
    assert last.outputs[0].shape == ir.Shape(["n"])
    assert x.shape == ir.Shape([2])


@pytest.mark.parametrize(
    ("attributes", "named"), [({"top_k": 2, "sorted": 1}, "sorted"), ({}, "top_k"), ({"k": 2}, "'k', 'top_k'")]
)
def test_attributes_outside_the_record_are_refused(attributes: dict[str, int], named: str) -> None:
    x = value("x", 2, 4)
    route = node("TopKRoute", [x], "ids", "moiie", **attributes)
    with pytest.raises(MoiieError, match="small: node node_ids: unexpected or missing attributes") as caught:
        passes.check_attributes(model([x], [route.outputs[0]], [route]), context())
    assert named in caught.value.message


def test_attributes_of_standard_ops_are_none_of_its_business() -> None:
    x = value("x", 2, 4)
    softmax = node("Softmax", [x], "y", axis=1)
    passes.check_attributes(model([x], [softmax.outputs[0]], [softmax]), context())


def routes(*top_k: int) -> ir.Model:
    """Several TopKRoute nodes over the same logits; ids and weights of each are outputs."""
    x = ir.Value(name="logits", shape=ir.Shape(["tokens", 4]), type=ir.TensorType(FLOAT))
    made = []
    for i, k in enumerate(top_k):
        route = ir.node("TopKRoute", [x], attributes={"top_k": k}, domain="moiie", num_outputs=2, name=f"route_{i}")
        for output, kind, dtype in zip(route.outputs, ("ids", "weights"), (ir.DataType.INT32, FLOAT), strict=True):
            output.name, output.shape, output.type = f"{kind}_{i}", ir.Shape(["tokens", k]), ir.TensorType(dtype)
        made.append(route)
    return model([x], [output for route in made for output in route.outputs], made)


def test_nodes_with_equal_attributes_share_a_body_and_others_get_an_overload() -> None:
    graph = routes(2, 1, 2)
    passes.attach_bodies(graph, context())
    assert set(graph.functions) == {("moiie", "TopKRoute", ""), ("moiie", "TopKRoute", "2")}
    assert [item.overload for item in graph.graph] == ["", "2", ""]


def test_two_overloads_of_one_op_run_in_one_graph(tmp_path: Path) -> None:
    graph = routes(2, 1, 3)
    passes.attach_bodies(graph, context())
    file = tmp_path / "routes.onnx"
    ir.save(graph, file)
    onnx.checker.check_model(str(file), full_check=True)
    logits = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"logits": logits}), strict=True))
    for i, top_k in enumerate((2, 1, 3)):
        ids, weights = topk_route(torch.from_numpy(logits), top_k)
        np.testing.assert_array_equal(found[f"ids_{i}"], ids)
        np.testing.assert_allclose(found[f"weights_{i}"], weights, atol=1e-6)
