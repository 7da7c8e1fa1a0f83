"""TRT_MoE: its body, which ONNX Runtime runs, is our expert dispatch; TensorRT's parser knows the node as its own layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moiie_export.graph.rewriting import clean
from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_moe import lower_native_moe
from moiie_export.graph.trt_prepare import lift_constants
from moiie_export.graph.trt_rules import check_rules
from moiie_export.ops.expert_dispatch import expert_dispatch
from moiie_export.targets import has_native_moe
from tests.rtx import need_rtx
from tests.trt_graphs import target

HIDDEN, INNER = 24, 16
BLACKWELL = {"sms": (100, 103), "plugins": "off", "banks": "constants"}


def graph(experts: tuple[int, ...], random: np.random.Generator) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """One bank of experts as lower_experts leaves it, its weights as constants."""
    banks = {
        "gate_up": random.standard_normal((len(experts), 2 * INNER, HIDDEN)).astype(np.float32) / 4,
        "down": random.standard_normal((len(experts), HIDDEN, INNER)).astype(np.float32) / 4,
    }
    kinds = {"hidden": (ir.DataType.FLOAT, HIDDEN), "ids": (ir.DataType.INT32, 3), "weights": (ir.DataType.FLOAT, 3)}
    given = [
        ir.Value(name=name, shape=ir.Shape(["tokens", width]), type=ir.TensorType(dtype))
        for name, (dtype, width) in kinds.items()
    ]
    constants = [
        ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(array)
        )
        for name, array in banks.items()
    ]
    inputs = [*given, *constants]
    node = ir.node("ExpertDispatch", inputs, attributes={"experts": list(experts)}, domain="moiie", name="experts")
    last = ir.node("Identity", [node.outputs[0]], name="last")
    out = last.outputs[0]
    out.name, out.shape, out.type = "out", ir.Shape(["tokens", HIDDEN]), ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph(
        given, [out], nodes=[node, last], initializers=constants, opset_imports={"": 23, "moiie": 1}, name="g"
    )
    return ir.Model(made, ir_version=10), banks


def lowered(model: ir.Model) -> TrtContext:
    context = TrtContext("decoder_prefill", target("server", **BLACKWELL))
    for each in (lower_native_moe, lambda model, _: lift_constants(model), lambda model, _: clean(model), check_rules):
        each(model, context)
    del model.opset_imports["moiie"]
    return context


@pytest.mark.parametrize("experts", [(0, 1, 2, 3), (1, 4, 6)], ids=["all", "a bank of some"])
@pytest.mark.parametrize("tokens", [1, 17])
def test_the_body_is_expert_dispatch(tmp_path: Path, experts: tuple[int, ...], tokens: int) -> None:
    """Routes to experts of other banks add nothing."""
    random = np.random.default_rng(tokens)
    model, banks = graph(experts, random)
    lowered(model)
    assert [node.domain for node in model.graph if node.op_type == "TRT_MoE"] == ["trt"]
    path = tmp_path / "moe.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    reachable = np.array(sorted({*experts, 0, 2}))
    ids = np.stack([random.permutation(reachable)[:3] for _ in range(tokens)]).astype(np.int32)
    feeds = {
        "hidden": random.standard_normal((tokens, HIDDEN)).astype(np.float32),
        "ids": ids,
        "weights": random.random((tokens, 3)).astype(np.float32),
    }
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    hidden, routes, weights = (torch.from_numpy(feeds[name]) for name in ("hidden", "ids", "weights"))
    stacks = [list(torch.from_numpy(banks[name])) for name in ("gate_up", "down")]
    expected = expert_dispatch(hidden, routes, weights, *stacks, list(experts)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "changes", [{"sms": (90, 100)}, {"plugins": "required"}, {"banks": "inputs"}, {"dialect": "rtx"}, {"sms": ()}]
)
def test_other_targets_keep_their_experts(changes: dict[str, object]) -> None:
    assert has_native_moe(target("server", **BLACKWELL))
    other = target("server", **{**BLACKWELL, **changes})
    assert not has_native_moe(other)
    model, _ = graph((0, 1), np.random.default_rng(0))
    lower_native_moe(model, TrtContext("decoder_prefill", other))
    assert [node.op_type for node in model.graph] == ["ExpertDispatch", "Identity"]


PARSE = """
import sys
from moiie_export.builders.library import load_library
trt = load_library("tensorrt_rtx").trt
log = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(sys.argv[1]), [parser.get_error(i).desc() for i in range(parser.num_errors)]
print([str(network.get_layer(i).type) for i in range(network.num_layers)])
"""


def test_a_parser_that_knows_the_layer_takes_the_node_for_it(tmp_path: Path) -> None:
    """TensorRT for RTX parses it, and builds it for none of its GPUs."""
    need_rtx()
    model, _ = graph((0, 1, 2), np.random.default_rng(0))
    lowered(model)
    path = tmp_path / "moe.onnx"
    ir.save(model, path)
    done = subprocess.run([sys.executable, "-c", PARSE, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.splitlines()[-1].count("MOE") == 1
