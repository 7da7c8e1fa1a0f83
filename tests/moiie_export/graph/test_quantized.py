"""Quantised storage in a graph: which nodes are rewritten, at which bytes they point, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moiie_export.graph import passes
from moiie_export.graph.components import Component
from moiie_export.graph.passes import PassContext
from moiie_export.ops.op import OPSET
from moiie_export.quantize.methods import quantizer
from moiie_export.quantize.packing import restore, stored_arrays, stored_specs
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.statistics import InputStatistics
from moiie_export.weights import Part, Weight, WeightMap
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorWriter, read_header

HIDDEN, INNER, EXPERTS = 64, 32, (1, 2, 5)
FLOAT = ir.DataType.FLOAT
FILE = "weights.safetensors"
INT4, INT8 = Scheme("int4", 32), Scheme("int8", 32)


def stack(name: str, shape: tuple[int, ...]) -> Weight:
    parts = tuple(Part("checkpoint", f"{name}.{e}", shape) for e in EXPERTS)
    views = {f"experts.{e}.{name}": i for i, e in enumerate(EXPERTS)}
    return Weight(f"experts.{name}", (len(EXPERTS), *shape), parts, views=views)


WEIGHTS = (
    Weight("proj.weight", (HIDDEN, HIDDEN), (Part("checkpoint", "p", (HIDDEN, HIDDEN)),)),
    Weight("head.weight", (48, HIDDEN), (Part("checkpoint", "h", (48, HIDDEN)),)),
    stack("gate_up_proj", (2 * INNER, HIDDEN)),
    stack("down_proj", (HIDDEN, INNER)),
)
SHAPES = {name: shape for weight in WEIGHTS for name, (_, shape) in weight.parameters().items()}


class Stored:
    """A weights file: each tensor in the form of its scheme, else float32 (float16 where `half` says so)."""

    def __init__(self, path: Path, schemes: Mapping[str, Scheme], half: tuple[str, ...] = ()) -> None:
        rng = np.random.default_rng(0)
        self.path, self.schemes = path / FILE, schemes
        self.values: dict[str, np.ndarray] = {}
        arrays: dict[str, tuple[str, np.ndarray]] = {}
        for name, shape, parameters in self._tensors():
            weight = (rng.standard_normal(shape) / 8).astype(np.float32)
            if name in schemes:
                weight = self._quantised(name, weight, arrays)
            else:
                kind, weight = ("F16", weight.astype(np.float16)) if name in half else ("F32", weight)
                arrays[name] = (kind, weight)
            self.values |= dict(zip(parameters, weight.astype(np.float32).reshape(-1, *shape[-2:]), strict=True))
        ordered = dict(sorted(arrays.items(), key=lambda item: {"F32": 0, "F16": 1}.get(item[1][0], 2)))
        with TensorWriter(self.path, {name: (kind, array.shape) for name, (kind, array) in ordered.items()}) as writer:
            for name, (_, array) in ordered.items():
                writer.write_elements(array, name)

    def _tensors(self) -> Any:
        """(tensor, shape, its parameters); a stack is split where one of its experts has a scheme of its own."""
        for weight in WEIGHTS:
            names = list(weight.parameters())
            if any(name in self.schemes and name != weight.name for name in names):
                yield from ((name, weight.shape[1:], [name]) for name in names)
            else:
                yield weight.name, weight.shape, names

    def _quantised(self, name: str, weight: np.ndarray, arrays: dict[str, tuple[str, np.ndarray]]) -> np.ndarray:
        scheme, rows = self.schemes[name], weight.reshape(-1, weight.shape[-1])
        sample = np.full((1, rows.shape[1]), 3, np.float32)
        made = quantizer("rtn", scheme.format)(rows, scheme, InputStatistics(1, sample[0], None, sample), name=name)
        specs, parts = stored_specs(weight.shape, scheme), stored_arrays(made, scheme)
        arrays |= {name + suffix: (kind, parts[suffix].reshape(shape)) for suffix, (kind, shape) in specs.items()}
        return restore(made, scheme).reshape(weight.shape)

    def context(self) -> PassContext:
        component = Component("small", None, (), (), (), tuple)  # type: ignore[arg-type]
        return PassContext(component, WeightMap(WEIGHTS, {}), read_header(self.path), FILE, self.schemes)


def value(name: str, *shape: int | str, dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def node(op: str, inputs: list[ir.Value], output: str, domain: str = "", **attributes: Any) -> ir.Node:
    made = ir.node(op, inputs, attributes=attributes, domain=domain, name=f"node_{output}")
    made.outputs[0].name = output
    return made


def as_model(inputs: list[ir.Value], output: ir.Value, nodes: list[ir.Node], weights: list[ir.Value]) -> ir.Model:
    output.shape, output.type = ir.Shape(["tokens", "features"]), ir.TensorType(FLOAT)
    opsets = {"": OPSET, "moiie": 1}
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=weights, opset_imports=opsets, name="main_graph")
    return ir.Model(graph, ir_version=10)


def layers() -> ir.Model:
    """x through proj with a bias, the experts and the head, as the exporter leaves it."""
    x, bias = value("x", "tokens", HIDDEN), np.arange(HIDDEN, dtype=np.float32) / 64
    ids, routed = value("ids", "tokens", 2, dtype=ir.DataType.INT32), value("weights", "tokens", 2)
    weights = {name: value(name, *shape) for name, shape in SHAPES.items()}
    offset = ir.Value(
        name="bias", shape=ir.Shape([HIDDEN]), type=ir.TensorType(FLOAT), const_value=ir.tensor(bias, name="bias")
    )
    proj = node("Gemm", [x, weights["proj.weight"], offset], "projected", transB=1)
    banks = [weights[f"experts.{e}.{kind}"] for kind in ("gate_up_proj", "down_proj") for e in EXPERTS]
    inputs = [proj.outputs[0], ids, routed, *banks]
    experts = node("ExpertDispatch", inputs, "mixed", "moiie", experts=list(EXPERTS))
    head = node("Gemm", [experts.outputs[0], weights["head.weight"]], "logits", transB=1)
    return as_model([x, ids, routed], head.outputs[0], [proj, experts, head], [*weights.values(), offset])


def rewritten(stored: Stored, model: ir.Model | None = None) -> ir.Model:
    model = model or layers()
    for each in (passes.quantize_nodes, passes.attach_weights, passes.check_attributes):
        each(model, stored.context())
    return model


def run(stored: Stored, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    passes.attach_bodies(model, stored.context())
    file = stored.path.with_name("small.onnx")
    ir.save(model, file)
    onnx.checker.check_model(str(file), full_check=True)
    result: np.ndarray = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return result


def feeds(tokens: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = np.array([rng.permutation(EXPERTS)[:2] for _ in range(tokens)], np.int32)
    x, weights = rng.standard_normal((tokens, HIDDEN)), rng.random((tokens, 2))
    return {"x": x.astype(np.float32), "ids": ids, "weights": weights.astype(np.float32)}


def by_hand(stored: Stored, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """The same layers on what the stored weights stand for, in float64."""
    w = {name: array.astype(np.float64) for name, array in stored.values.items()}
    hidden = given["x"] @ w["proj.weight"].T + np.arange(HIDDEN) / 64
    out = np.zeros_like(hidden)
    for t, slot in np.ndindex(given["ids"].shape):
        expert = f"experts.{given['ids'][t, slot]}"
        gate, up = np.split(w[f"{expert}.gate_up_proj"] @ hidden[t], 2)
        out[t] += given["weights"][t, slot] * (w[f"{expert}.down_proj"] @ (gate / (1 + np.exp(-gate)) * up))
    result: np.ndarray = out @ w["head.weight"].T
    return result


EXPERT_STACKS = ("experts.gate_up_proj", "experts.down_proj")
CASES: dict[str, tuple[dict[str, Scheme], tuple[str, ...]]] = {
    "everything int4": (dict.fromkeys(["proj.weight", "head.weight", *EXPERT_STACKS], INT4), ()),
    "everything int8": (dict.fromkeys(["proj.weight", "head.weight", *EXPERT_STACKS], INT8), ()),
    "experts only, the rest float16": (dict.fromkeys(EXPERT_STACKS, INT4), ("proj.weight", "head.weight")),
    "linear layers only": ({"proj.weight": INT8, "head.weight": Scheme("int4", 64)}, ()),
    "an expert of its own kind": (
        {"experts.1.gate_up_proj": INT4, "experts.2.gate_up_proj": Scheme("int8", 64), "experts.down_proj": INT8},
        ("experts.5.gate_up_proj",),
    ),
    "experts fp8, one of them int8": (
        {"experts.1.gate_up_proj": INT8, "experts.2.gate_up_proj": Scheme("fp8"), "experts.down_proj": Scheme("fp8")},
        ("experts.5.gate_up_proj",),
    ),
    "fp8 and w8a8": ({"proj.weight": Scheme("fp8"), "head.weight": Scheme("w8a8")}, ()),
}


@pytest.mark.parametrize(("schemes", "half"), CASES.values(), ids=CASES)
def test_the_rewritten_graph_computes_what_the_stored_weights_stand_for(
    tmp_path: Path, schemes: dict[str, Scheme], half: tuple[str, ...]
) -> None:
    stored = Stored(tmp_path, schemes, half)
    given = feeds()
    found = run(stored, rewritten(stored), given)
    expected = by_hand(stored, given)
    # w8a8 rounds its inputs too, in steps of 3/127 here
    bound = 0.05 if Scheme("w8a8") in schemes.values() else 1e-5
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


def test_nothing_changes_where_nothing_is_quantised(tmp_path: Path) -> None:
    assert [item.op_type for item in rewritten(Stored(tmp_path, {})).graph] == ["Gemm", "ExpertDispatch", "Gemm"]


def test_nodes_and_initialisers_of_the_rewritten_graph(tmp_path: Path) -> None:
    model = rewritten(Stored(tmp_path, dict.fromkeys(["proj.weight", "experts.gate_up_proj"], INT4)))
    assert [item.op_type for item in model.graph] == ["QuantizedLinear", "Add", "QuantizedExpertDispatch", "Gemm"]
    linear, bias, experts, head = model.graph
    assert [v.name for v in linear.inputs if v] == ["x", "proj.weight", "proj.weight.scales"]
    assert [v.name for v in bias.inputs if v] == ["projected.unbiased", "bias"]
    assert bias.outputs[0].name == "projected"
    assert [v.name for v in experts.inputs[3:] if v] == [
        *(f"experts.{e}.gate_up_proj" for e in EXPERTS),
        *(f"experts.{e}.down_proj" for e in EXPERTS),
        *(f"experts.{e}.gate_up_proj.scales" for e in EXPERTS),
    ]
    attributes = {name: attribute.value for name, attribute in experts.attributes.items()}
    assert {name: list(numbers) for name, numbers in attributes.items()} == {
        "experts": list(EXPERTS),
        "gate_up_bits": [4, 4, 4],
        "gate_up_group_sizes": [32, 32, 32],
        "down_bits": [32, 32, 32],
        "down_group_sizes": [0, 0, 0],
    }
    assert [v.name for v in head.inputs if v] == ["mixed", "head.weight"]
    kinds = {name: (item.dtype, tuple(item.shape or ())) for name, item in model.graph.initializers.items()}
    assert kinds["experts.2.gate_up_proj"] == (ir.DataType.INT4, (2 * INNER, HIDDEN))
    assert kinds["experts.2.gate_up_proj.scales"] == (ir.DataType.FLOAT16, (2 * INNER, HIDDEN // 32))


def test_a_view_of_a_stack_is_its_own_bytes_and_scales(tmp_path: Path) -> None:
    stored = Stored(tmp_path, {"experts.down_proj": INT4})
    model, header, blob = rewritten(stored), read_header(stored.path), stored.path.read_bytes()
    for index, expert in enumerate(EXPERTS):
        for suffix, size in (("", HIDDEN * INNER // 2), (".scales", HIDDEN * 2)):
            tensor = model.graph.initializers[f"experts.{expert}.down_proj{suffix}"].const_value
            assert isinstance(tensor, ir.ExternalTensor)
            start = header[f"experts.down_proj{suffix}"].offset + index * size
            assert (tensor.offset, tensor.length, tensor.nbytes) == (start, size, size)
            assert start + size <= len(blob)


def test_layers_that_share_a_weight_share_its_bytes(tmp_path: Path) -> None:
    x, weight = value("x", "tokens", HIDDEN), value("proj.weight", HIDDEN, HIDDEN)
    first = node("Gemm", [x, weight], "a", transB=1)
    second = node("Gemm", [first.outputs[0], weight], "y", transB=1)
    stored = Stored(tmp_path, {"proj.weight": INT8})
    model = rewritten(stored, as_model([x], second.outputs[0], [first, second], [weight]))
    assert list(model.graph.initializers) == ["proj.weight", "proj.weight.scales"]
    given = feeds()["x"]
    w = stored.values["proj.weight"].T
    np.testing.assert_allclose(run(stored, model, {"x": given}), given @ w @ w, atol=1e-5)


def refusal(tmp_path: Path, consumer: ir.Node, scheme: Scheme = INT4) -> MoiieError:
    stored = Stored(tmp_path, {"proj.weight": scheme})
    weight = next(v for v in consumer.inputs if v is not None and v.name == "proj.weight")
    inputs = [v for v in consumer.inputs if v is not None and v is not weight]
    with pytest.raises(MoiieError) as caught:
        rewritten(stored, as_model(inputs, consumer.outputs[0], [consumer], [weight]))
    return caught.value


@pytest.mark.parametrize(
    "consumer",
    [
        node("Gather", [value("proj.weight", HIDDEN, HIDDEN), value("rows", 3, dtype=ir.DataType.INT64)], "y"),
        node("MatMul", [value("x", 3, HIDDEN), value("proj.weight", HIDDEN, HIDDEN)], "y"),
        node("Gemm", [value("x", 3, HIDDEN), value("proj.weight", HIDDEN, HIDDEN)], "y"),
        node("Gemm", [value("x", 3, HIDDEN), value("proj.weight", HIDDEN, HIDDEN)], "y", transB=1, alpha=0.5),
        node("Gemm", [value("proj.weight", HIDDEN, HIDDEN), value("x", 3, HIDDEN)], "y", transB=1),
        node("Conv", [value("pixels", 1, 3, 8, 8), value("proj.weight", HIDDEN, HIDDEN)], "y"),
    ],
    ids=["Gather", "MatMul", "Gemm not transposed", "Gemm with a factor", "Gemm from the left", "Conv"],
)
def test_an_op_without_a_quantised_form_is_named_with_the_weight(tmp_path: Path, consumer: ir.Node) -> None:
    error = refusal(tmp_path, consumer)
    expected = f"small: proj.weight is stored as int4, for which node node_y ({consumer.op_type}) has no form"
    assert error.message == expected
    assert "rule for proj.weight" in str(error.hint)


def test_experts_have_no_form_that_rounds_activations(tmp_path: Path) -> None:
    stored = Stored(tmp_path, {"experts.down_proj": Scheme("w8a8")})
    with pytest.raises(MoiieError, match="experts.1.down_proj is stored as w8a8, for which node node_mixed"):
        rewritten(stored)
