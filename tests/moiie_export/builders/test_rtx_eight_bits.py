"""fp8 and w8a8 rules from export to engines: graphs agree with their weights, GPUs without the arithmetic are refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import moiie_runtime as mr
from moiie_export.builders import BuildRequest, build
from moiie_export.builders.plan_file import accelerators, plan_text
from moiie_export.builders.tensorrt import build_engines
from moiie_export.parity import check_parity
from moiie_export.recipe import CalibrationSection
from moiie_export.recipe_parity import ParityCase
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.errors import MissingDependency
from moiie_runtime.tensors import TensorFile
from tests.conftest import GOLDEN
from tests.exports import BUNDLES, SMALLEST, Exported, _kept, small_recipe, sources_digest
from tests.moiie_export.parity.conftest import CONTEXT
from tests.moiie_export.parity.test_quantised import LOOSE, bound
from tests.plugins.cpp.shell import released
from tests.rtx import need_rtx
from tests.synthetic import write_checkpoint
from tests.trt_graphs import dialect_feeds, feeds, lowered, target
from tests.trt_reference import run_dialect

RULES = (QuantRule(("attention", "experts"), "fp8"), QuantRule(("lm_head", "projector"), "w8a8"))
PICTURE = GOLDEN / "moiie_phi3" / "inputs" / "image_0.png"
pytestmark = pytest.mark.slow


def eight_bits() -> Exported:
    """One layer of decoder with attention and experts in fp8, its head and the projector in w8a8."""
    cases = (ParityCase("What is this?", (PICTURE,)), ParityCase("Name a colour, and say why."))
    recipe = replace(
        small_recipe(max_context=CONTEXT),
        quantization=QuantizationSection(RULES),
        calibration=CalibrationSection(cases=cases),
    )
    folder = BUNDLES / sources_digest() / "eight-bits"
    result = Exported(folder / "checkpoint", folder / "bundle", recipe)
    return _kept(result, folder, lambda: write_checkpoint(result.checkpoint, **SMALLEST))


@pytest.fixture(scope="module")
def base() -> Exported:
    return eight_bits()


@pytest.fixture
def copied(base: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base.bundle, tmp_path / "bundle"))


def test_the_bundle_is_the_checkpoint_within_its_bounds(base: Exported, copied: Path) -> None:
    bound(copied, fp8=LOOSE, int8=LOOSE)
    report = check_parity(copied, base.checkpoint)
    assert report, [check for check in report.checks if not check.passed]
    assert {"weights"} & {word for check in report.checks for word in check.name.split()}


def test_a_dialects_graph_computes_the_portable_one(base: Exported, tmp_path: Path) -> None:
    component = "decoder_decode"
    with OnnxRuntimeSession(base.bundle / "onnx" / f"{component}.onnx", threads=1) as session:
        wanted = session.run(feeds(base.bundle, component))["logits"]
    for name in ("rtx", "orin"):
        made = lowered(base.bundle, component, target(name, plugins="required", precision="float32"))
        stored = {node.inputs[0].dtype for node in made.nodes("DequantizeLinear") if node.inputs[0] is not None}
        assert {ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8} <= stored
        assert len(made.nodes("QuantizeLinear")) == 1, "the head's rows are rounded"
        (experts,) = made.nodes("Fp8ExpertDispatch")
        assert [str(each.dtype) for each in experts.inputs[3:]] == [*["FLOAT8E4M3FN"] * 2, *["FLOAT"] * 2]
        found = run_dialect(made.save(tmp_path), dialect_feeds(made, feeds(base.bundle, component)))["logits"]
        assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())


def test_it_builds_where_there_is_float8(copied: Path) -> None:
    """With the experts as inputs of the engines, in E4M3 as they are stored, for two GPUs together."""
    need_rtx()
    wanted = target("rtx", plugins="required", sms=(89, 120), prefill=(8, 64))
    result = build_engines(BuildRequest(copied, wanted, plugin_library=released().library), lambda *_: None)
    inputs = ["experts.0.language.down", "experts.0.language.gate_up"]
    for phase in ("decode", "prefill"):
        text = plan_text((result.path / f"decoder_{phase}.engine").read_bytes())
        assert accelerators(text) == {(89, 120)}
        assert re.search(r'custom_layer=\{[^}]*name="experts.0.language', text)
        for name in inputs:
            assert re.search(rf'name="{name}\.\d+" [^\n]*type=fp8_e4m3', text), name
        assert "type=int8" in text
    document = json.loads((result.path / "engine.json").read_text(encoding="utf-8"))
    described = {each["name"]: each["dtype"] for each in document["components"]["decoder_decode"]["inputs"]}
    assert [described[name] for name in inputs] == ["float8_e4m3fn"] * 2
    assert described["experts.0.language.down_scales"] == "float32"
    header = TensorFile(result.path / "banks.safetensors").header
    assert {info.dtype for info in header.values()} == {"F8_E4M3", "F32"}


def test_a_cpu_runs_the_portable_bodies(base: Exported, copied: Path) -> None:
    build(BuildRequest(copied, target("cpu")), lambda *_: None)
    question = [{"role": "user", "content": "What is this?"}]
    answers = []
    for bundle, name in ((base.bundle, None), (copied, "cpu")):
        with mr.load(bundle, target=name, threads=1) as vlm:
            answers.append(vlm.generate(question, max_new_tokens=2, record=mr.Record(step_logits=True)))
    wanted, found = (answer.step_logits for answer in answers)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_an_older_gpu_is_refused_before_anything_is_built(copied: Path) -> None:
    need_rtx()
    with pytest.raises(MissingDependency, match=r"holds fp8 weights, which need SM 89 or above, not SM 86") as caught:
        build_engines(BuildRequest(copied, target("rtx", sms=(86, 89))), lambda *_: None)
    assert "--sm" in str(caught.value.hint)
    assert not (copied / "engines").exists()
