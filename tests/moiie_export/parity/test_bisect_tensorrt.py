"""Bisection of TensorRT engines on an emulated GPU, whose marked engines compute their marked graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.dialect_graph import lower_component, save_graph
from moiie_export.builders.engine_specs import Profile
from moiie_export.parity import bisect_tensorrt
from moiie_export.parity.bisect import BLOCK, Bisection, bisect
from moiie_export.parity.bisect_graphs import readable
from moiie_export.parity.bisect_inputs import made_up_inputs
from moiie_export.parity.bisect_sides import values_of
from moiie_export.parity.bisect_tensorrt import mark
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import open_engine
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import read_header
from tests.exports import SMALLEST, exported
from tests.rtx import need_rtx
from tests.runtime.backends.conftest import cuda, trt
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt, write_plan
from tests.runtime.backends.engine_bundle import build, edit
from tests.trt_graphs import target
from tests.trt_reference import Dialect

__all__ = ["cuda", "trt"]
ALIASES = {"present.0.key": "past_key_values.0.key", "present.0.value": "past_key_values.0.value"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target `kept` has its graphs beside it, `two` has none, and two rows."""
    copy = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("bisect") / "bundle"))
    build(copy, "kept", {"prefill": (32,)}, dialect=True)
    build(copy, "two", {"prefill": (32,), "batch": 2})
    return copy


@pytest.fixture
def found(trt: EmulatedTensorRt, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Bisection]:
    """Bisects a target of a bundle, and sees that nothing is left on the device."""

    def bisected(root: Path, target: str) -> Bisection:
        bundle = Bundle.open(root)
        rows = {"kept": 1, "two": 2}[target]
        monkeypatch.setattr(
            bisect_tensorrt, "run_job", lambda _, job, __: write_plan(job.output, plan(job, root, rows))
        )
        engine = open_engine(bundle, target)
        options = engine.options()
        try:
            with closing(values_of(engine, options)) as values:
                result = bisect(bundle, engine, values, lambda *_: None)
        finally:
            options.close()
        assert not any(trt.cuda.left.values())
        return result

    return bisected


def plan(job: EngineJob, bundle: Path, rows: int) -> dict[str, Any]:
    """What TensorRT would say of the marked graph, for the sizes of the inputs that will come."""
    given = made_up_inputs(Bundle.open(bundle), job.name, rows=rows)
    graph = onnx.load(job.graph, load_external_data=False).graph
    inputs = []
    for value in graph.input:
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        inputs.append({"name": value.name, "dtype": dtype.name, "shape": shape})
    feeds = {
        each["name"]: given[each["name"]].astype(each["dtype"])
        if each["name"] in given
        else np.zeros(each["shape"], each["dtype"])
        for each in inputs
    }
    made = Dialect(job.graph).run(feeds)
    outputs = [{"name": name, "dtype": array.dtype.name, "shape": list(array.shape)} for name, array in made.items()]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "graph": str(job.graph),
        "dialect": True,
        "batch": rows,
        "host": [],
        "profiles": [{"name": each.name, "sizes": dict(each.sizes)} for each in job.profiles],
        "aliases": {name: source for name, source in ALIASES.items() if name in made},
        "banks": {},
        "workspace": 1 << 12,
        "constants": 1 << 12,
    }


@pytest.mark.parametrize("target", ["kept", "two"])
def test_a_healthy_engine_has_no_bad_node(found: Callable[..., Bisection], engines: Path, target: str) -> None:
    """With the graphs that were kept, and with those made again from the bundle."""
    result = found(engines, target)
    assert result.differences == ()
    assert all(count > 30 for count in result.compared.values()), result.compared
    assert 0 < max(result.worst.values()) < 0.01, "float16 rounds"


def test_a_changed_node_is_named(found: Callable[..., Bisection], engines: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(engines, tmp_path / "bundle"))
    path = bundle / "engines" / "kept" / "graphs" / "decoder_decode.onnx"
    model = onnx.load(path, load_external_data=False)
    node = [each for each in model.graph.node if each.op_type == "RMSNormalization"][1]
    next(each for each in node.attribute if each.name == "epsilon").f = 10.0
    onnx.save(model, path)
    (difference,) = found(bundle, "kept").differences
    assert (difference.component, difference.node, difference.op) == ("decoder_decode", node.name, "RMSNormalization")


def test_experts_that_are_others_are_found_where_they_are_used(
    found: Callable[..., Bisection], engines: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(engines, tmp_path / "bundle"))
    path = bundle / "engines" / "two" / "banks.safetensors"
    info = read_header(path)["experts.0.language.gate_up"]
    numbers = np.memmap(path, np.float16, "r+", info.offset, info.shape)
    numbers[:] *= -1
    numbers.flush()
    differences = found(bundle, "two").differences
    assert [each.component for each in differences] == ["decoder_prefill", "decoder_decode"]
    assert all(each.origin.startswith("decoder.layers.0.mlp") for each in differences)


def test_an_engine_of_another_version_is_not_taken_for_this_one(
    found: Callable[..., Bisection], engines: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(engines, tmp_path / "bundle"))
    document = open_engine(Bundle.open(bundle), "two").document
    edit(bundle, "two", settings={**document["settings"], "banks": "constants"})
    with pytest.raises(MoiieError, match="makes another graph for decoder_prefill than the engine's"):
        found(bundle, "two")


@pytest.mark.parametrize("component", ["vision_encoder", "decoder_decode"])
def test_tensorrt_builds_marked_graphs(tmp_path: Path, component: str) -> None:
    """The real parser wants types of outputs, and takes values that are shapes."""
    need_rtx()
    bundle = Bundle.open(exported(SMALLEST).bundle)
    made, _ = lower_component(bundle, component, target("rtx", plugins="off"))
    model = onnx.load(save_graph(made, component, tmp_path), load_external_data=False)
    names = [name for node in model.graph.node for name in node.output]
    wanted = [name for name in names if name in readable(model)][:BLOCK]
    graph = tmp_path / "marked.onnx"
    onnx.save(mark(model, wanted), graph)
    profile = Profile("all", {"images": (1, 1, 1)} if component == "vision_encoder" else {})
    plan = tmp_path / "marked.engine"
    bisect_tensorrt.run_job("tensorrt_rtx", EngineJob(component, graph, plan, [profile], (89,)), lambda *_: None)
    text = plan.read_bytes()
    assert all(name.encode() in text for name in wanted)
