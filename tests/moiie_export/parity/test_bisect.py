"""A fault in a built form is found where it was made, and a healthy one has none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moiie_export.builders import BuildRequest, build
from moiie_export.parity.bisect import Bisection, Difference, _near_tie, bisect
from moiie_export.parity.bisect_sides import values_of
from moiie_export.targets import find_target
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import open_engine
from moiie_runtime.tensors import read_header
from tests.exports import exported
from tests.host_device import emulate

MODEL = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "layers": 2, "backbone": "llama"}
MODEL |= {"tower": (32, 64, 2, 2, 28, 14)}
RULES = (
    {"match": ("*experts.0.*", "lm_head"), "format": "int8"},
    {"match": ("experts", "dense", "attention"), "format": "int4"},
    {"match": ("vision_tower",), "format": "int8"},
)
TARGETS = {
    "cpu": find_target("cpu"),
    "ort-cuda": find_target("ort-cuda"),
    "wide": replace(find_target("ort-cuda"), name="wide", precision="float32"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(
        shutil.copytree(exported(MODEL, "float32", 256, RULES).bundle, tmp_path_factory.mktemp("bisect") / "bundle")
    )


@pytest.fixture
def engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Target -> its folder, freshly built."""
    emulate(monkeypatch)
    return lambda name: build(BuildRequest(bundle, TARGETS[name], force=True), lambda *_: None).path


def found(folder: Path) -> Bisection:
    bundle = Bundle.open(folder.parent.parent)
    opened = open_engine(bundle, folder.name)
    options = opened.options()
    try:
        return bisect(bundle, opened, values_of(opened, options), lambda *_: None)
    finally:
        options.close()


def first(folder: Path, component: str) -> Difference:
    return next(each for each in found(folder).differences if each.component == component)


def reader(folder: Path, component: str, place: int) -> tuple[onnx.NodeProto, str]:
    """A linear layer of an engine by its place, and the weight that it reads."""
    header = read_header(folder / "weights.safetensors")
    graph = onnx.load(folder / f"{component}.onnx", load_external_data=False).graph
    linear = [
        each for each in graph.node if each.op_type in ("Gemm", "MatMulNBits", "QLinear") and each.input[1] in header
    ]
    return linear[place], linear[place].input[1]


def damage(folder: Path, weight: str) -> None:
    """Other numbers in the place of a weight."""
    path = folder / "weights.safetensors"
    info = read_header(path)[weight]
    kind = {"F16": np.float16, "F32": np.float32}.get(info.dtype, np.uint8)
    numbers = np.memmap(path, kind, "r+", info.offset, (info.nbytes // np.dtype(kind).itemsize,))
    numbers[:] = numbers[::-1].copy()
    numbers.flush()


@pytest.mark.parametrize("name", TARGETS)
def test_a_healthy_engine_has_no_bad_node(engine: Callable[[str], Path], name: str) -> None:
    result = found(engine(name))
    assert result.differences == ()
    assert all(count > 25 for count in result.compared.values()), result.compared
    assert max(result.worst.values()) < {"cpu": 0.2, "ort-cuda": 0.05, "wide": 1e-4}[name]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("component", "place", "module"),
    [
        ("vision_encoder", 2, "vision_encoder.tower.layers.0"),
        ("decoder_prefill", 3, "decoder.layers.0.mlp"),
        ("decoder_decode", -1, "decoder.lm_head"),
    ],
)
def test_a_damaged_weight_is_found_where_it_is_used(
    engine: Callable[[str], Path], name: str, component: str, place: int, module: str
) -> None:
    folder = engine(name)
    node, weight = reader(folder, component, place)
    damage(folder, weight)
    difference = first(folder, component)
    assert (difference.node, difference.op, difference.unseen) == (node.name, node.op_type, ())
    assert difference.origin.startswith(module)
    assert difference.error > difference.bound


@contextmanager
def changed(path: Path) -> Iterator[Any]:
    """The nodes of a graph file, which is written again with what was done to them."""
    model = onnx.load(path, load_external_data=False)
    yield model.graph.node
    onnx.save(model, path)


def test_a_changed_node_is_named(engine: Callable[[str], Path]) -> None:
    folder = engine("wide")
    with changed(folder / "decoder_prefill.onnx") as nodes:
        node = next(each for each in nodes if each.op_type == "Sigmoid")
        node.op_type = "Tanh"
    (difference,) = found(folder).differences
    assert (difference.component, difference.node, difference.op) == ("decoder_prefill", node.name, "Tanh")
    assert difference.origin.startswith("decoder.layers.0.mlp")
    assert f"the first bad node is {node.name} (Tanh), in decoder.layers.0.mlp" in str(difference)


def test_a_fused_op_that_is_wrong_is_named(engine: Callable[[str], Path]) -> None:
    """An attribute of GroupQueryAttention: what it gives is compared behind it."""
    folder = engine("ort-cuda")
    with changed(folder / "decoder_decode.onnx") as nodes:
        node = [each for each in nodes if each.op_type == "GroupQueryAttention"][1]
        node.attribute.append(onnx.helper.make_attribute("scale", 3.0))
    difference = first(folder, "decoder_decode")
    assert node.name in (difference.node, *difference.unseen)
    assert difference.origin.startswith("decoder.layers.1.self_attn")


def test_values_that_are_not_finite_differ(engine: Callable[[str], Path]) -> None:
    folder = engine("wide")
    with changed(folder / "vision_encoder.onnx") as nodes:
        node = next(each for each in nodes if each.op_type == "Gelu")
        node.op_type = "Log"
        del node.attribute[:]
    difference = first(folder, "vision_encoder")
    assert (difference.node, difference.error) == (node.name, float("inf"))


def test_a_jump_is_told_from_rounding_that_adds_up() -> None:
    known = ("vision_encoder", "value", "node", "Op", "")
    jump, gradual = (Difference(*known, 0.06, 0.05, before, ()) for before in (0.001, 0.047))
    assert (jump.gradual, gradual.gradual) == (False, True)
    assert "off by 0.06, allowed are 0.05, and values before it are off by 0.047 at most" in str(gradual)


@pytest.mark.parametrize(
    ("found", "logits", "tie"),
    [
        ([[0, 1]], [[2.0, 1.0, 0.0]], False),  # the same route
        ([[0, 2]], [[2.0, 1.0, 0.99]], True),
        ([[0, 2]], [[2.0, 1.0, 0.0]], False),
        ([[1, 0]], [[2.0, 1.999, 0.0]], True),  # the same experts in another order
        ([[1, 0]], [[2.0, 1.0, 0.0]], False),
        ([[0, 2]], [[2.0, 1.0, -np.inf]], False),  # where the token may not go
    ],
)
def test_a_route_may_differ_where_the_router_hardly_decides(
    found: list[list[int]], logits: list[list[float]], tie: bool
) -> None:
    wanted = np.array([[0, 1]], np.int32)
    assert _near_tie(np.array(found, np.int32), wanted, np.array(logits, np.float32), 0.01) is tie
