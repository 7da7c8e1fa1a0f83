"""ExpertDispatch as com.microsoft.MoE: any routes, any weights, the same result as the portable body."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moiie_export.graph.cuda_experts import NOWHERE, find_banks, fuse_experts
from moiie_export.graph.passes import attach_bodies
from moiie_export.graph.rewriting import CONTRIB, clean
from moiie_export.ops import DOMAIN
from moiie_export.ops.op import OPSET
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession

HIDDEN, INNER, TOP_K = 16, 24, 2


def graph(experts: list[int], inner: int) -> ir.Model:
    """One node that dispatches to some experts, whose weights lie in a file that nobody reads."""

    def value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    hidden = value("hidden", ir.DataType.FLOAT, ("tokens", HIDDEN))
    ids = value("ids", ir.DataType.INT32, ("tokens", TOP_K))
    weights = value("weights", ir.DataType.FLOAT, ("tokens", TOP_K))
    banks = []
    for kind, shape in (("gate_up_proj", (2 * inner, HIDDEN)), ("down_proj", (HIDDEN, inner))):
        for expert in experts:
            name = f"mlp.experts.{expert}.{kind}"
            tensor = ir.ExternalTensor(
                "weights", 0, 4 * shape[0] * shape[1], ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
            )
            bank = value(name, ir.DataType.FLOAT, shape)
            bank.const_value = tensor
            banks.append(bank)
    node = ir.node(
        "ExpertDispatch", [hidden, ids, weights, *banks], {"experts": experts}, domain=DOMAIN, name="dispatch"
    )
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph(
        [hidden, ids, weights],
        list(node.outputs),
        nodes=[node],
        initializers=banks,
        opset_imports={"": OPSET, DOMAIN: 1},
    )
    return ir.Model(made, ir_version=10)


def run(model: ir.Model, arrays: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> np.ndarray:
    clean(model)
    attach_bodies(model)
    model.opset_imports[CONTRIB] = 1
    for name, initializer in model.graph.initializers.items():
        if name in arrays:
            initializer.const_value = ir.tensor(arrays[name], name=name)
    proto: onnx.ModelProto = ir.to_proto(model)
    with OnnxRuntimeSession(proto.SerializeToString()) as session:
        return session.run(feeds)["out"]


@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [1, 2, 3]])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("total", [1.0, 0.3])
def test_it_computes_the_dispatch(experts: list[int], tokens: int, total: float) -> None:
    """A decode graph lists fewer experts than the stack that it shares with prefill; weights need not sum to 1."""
    random = np.random.default_rng(tokens)
    every = [0, 1, 2, 3]
    gate_up = random.standard_normal((4, 2 * INNER, HIDDEN), np.float32)
    down = random.standard_normal((4, HIDDEN, INNER), np.float32)
    ids = np.stack([random.permutation(experts)[:TOP_K] for _ in range(tokens)]).astype(np.int32)
    weights = random.random((tokens, TOP_K), np.float32)
    weights[0] = (1, 0)  # one expert alone
    weights *= total / weights.sum(axis=1, keepdims=True)
    feeds = {"hidden": random.standard_normal((tokens, HIDDEN), np.float32), "ids": ids, "weights": weights}
    arrays = {f"mlp.experts.{e}.gate_up_proj": gate_up[e] for e in every}
    arrays |= {f"mlp.experts.{e}.down_proj": down[e] for e in every}
    wanted = run(graph(experts, INNER), arrays, feeds)
    banks = find_banks([graph(every, INNER), graph(experts, INNER)])
    fused = graph(experts, INNER)
    stacks = fuse_experts(fused, banks, ir.DataType.FLOAT, frozenset())
    paired = np.stack((gate_up[:, :INNER], gate_up[:, INNER:]), axis=2).reshape(4, 2 * INNER, HIDDEN)
    found = run(fused, {name: paired if stack.paired else down for name, stack in stacks.items()}, feeds)
    assert sum(node.op_type == "MoE" for node in fused.graph) == 1
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_logarithms_in_float16_keep_routes_and_weights() -> None:
    """What the op makes of its rows on a GPU: softmax in float32 of float16 numbers, then top-k, then renormalised."""
    random = np.random.default_rng(5)
    for experts, top_k in ((4, 2), (8, 2), (64, 6), (3, 1)):
        weights = np.zeros((4000, experts), np.float32)
        ids = random.random(weights.shape).argpartition(top_k, axis=1)[:, :top_k]
        shares = random.random(ids.shape).astype(np.float32) ** random.integers(1, 30, ids.shape) + np.float32(1e-12)
        np.put_along_axis(weights, ids, shares / shares.sum(axis=1, keepdims=True), axis=1)
        rows = np.log(np.maximum(weights, np.float32(NOWHERE))).astype(np.float16)
        assert np.isfinite(rows).all()
        powers = np.exp(rows.astype(np.float32))
        chosen = np.argsort(-powers, axis=1, kind="stable")[:, :top_k]
        np.testing.assert_array_equal(np.sort(chosen, axis=1), np.sort(ids, axis=1))
        found = np.zeros_like(weights)
        kept = np.take_along_axis(powers, chosen, axis=1)
        np.put_along_axis(found, chosen, kept / kept.sum(axis=1, keepdims=True), axis=1)
        assert np.abs(found - weights).max() < 2**-11


def test_sizes_that_the_op_does_not_take_stay_a_loop_in_float32() -> None:
    model = graph([0, 1], 20)
    assert fuse_experts(model, find_banks([model]), ir.DataType.FLOAT16, frozenset()) == {}
    assert [node.op_type for node in model.graph] == ["ExpertDispatch"]
    assert model.graph[0].metadata_props


def test_islands_stay_float32() -> None:
    model = graph([0, 1], INNER)
    islands = frozenset({"mlp.experts.1.down_proj"})
    stacks = fuse_experts(model, find_banks([model]), ir.DataType.FLOAT16, islands)
    assert {stack.dtype for stack in stacks.values()} == {ir.DataType.FLOAT}
