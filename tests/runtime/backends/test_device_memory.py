"""What a built form is predicted to take on its GPU: what it does take there, and what `moiie check` said before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import moiie_runtime as mr
from moiie_export.builders import BuildRequest, build
from moiie_export.check.report import check_model
from moiie_export.source import ModelSource
from moiie_export.targets import find_target
from moiie_runtime.bundle import Bundle
from moiie_runtime.device_memory import DeviceEstimate, estimate_device
from moiie_runtime.engines import Engine, open_engine
from moiie_runtime.errors import MissingDependency
from moiie_runtime.memory import Request
from moiie_runtime.tensors import read_header
from tests.exports import SMALLEST, exported

TEXT = [{"role": "user", "content": "Describe."}]
PICTURE = Request(prompt_tokens=200, new_tokens=20, images=1)


def engine_of(bundle: Path, target: str) -> Engine:
    return open_engine(Bundle.open(bundle), target)


@pytest.mark.parametrize("target", ["rtx", "four", "copying"])
def test_buffers_are_predicted_to_the_byte(trt, engine_bundle, target):
    engine = engine_of(engine_bundle, target)
    estimate = estimate_device(engine)
    banks = read_header(engine_bundle / "engines" / target / "banks.safetensors")
    assert estimate.language_experts + estimate.vision_experts == sum(info.nbytes for info in banks.values())
    with mr.load(engine_bundle, target=target, threads=1) as vlm:
        answer = vlm.stream(TEXT, max_new_tokens=4)
        for _ in range(3):
            next(answer)
        held = vlm._options.device.memory().allocated
        answer.close()
    stays = estimate.answering(engine.releases_after_prefill) - estimate.prefill - estimate.decode - estimate.workspace
    assert 0 <= held - stays < 1 << 19  # what graphs work with here is the emulation's


def test_parts_follow_the_request_and_the_target(engine_bundle):
    resident, small = (estimate_device(engine_of(engine_bundle, name)) for name in ("rtx", "small"))
    pictured = estimate_device(engine_of(engine_bundle, "rtx"), PICTURE)
    assert resident.vision == 0 < pictured.vision
    assert replace(pictured, vision=0, workspace=0, inputs_and_outputs=0) == replace(
        resident, workspace=0, inputs_and_outputs=0
    )
    assert pictured.inputs_and_outputs > resident.inputs_and_outputs > 0
    assert pictured.answering(True) == pictured.peak - pictured.vision - pictured.vision_experts
    assert small.kv_cache == resident.kv_cache
    assert "on the GPU (" in str(resident)
    assert "vision 0" not in str(resident)
    four = estimate_device(engine_of(engine_bundle, "four"))
    assert (four.kv_cache, four.workspace > resident.workspace) == (4 * resident.kv_cache, True)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(trt, engine_bundle):
    needed = estimate_device(engine_of(engine_bundle, "rtx")).peak
    trt.cuda.total = needed - 1
    with pytest.raises(
        MissingDependency, match=r"exceeds the free memory of Emulated GPU \(CUDA device 0\) of"
    ) as caught:
        mr.load(engine_bundle, target="rtx")
    assert "memory_limit" in str(caught.value.hint)
    assert trt.cuda.calls["cuMemAlloc"] == 0
    mr.load(engine_bundle, target="rtx", memory_limit=needed).close()  # who says what it may take is believed
    trt.cuda.total = 1 << 40
    with pytest.raises(MissingDependency, match="exceeds the limit of"):
        mr.load(engine_bundle, target="rtx", memory_limit=needed - 1)
    assert not any(trt.cuda.left.values())


@pytest.fixture(scope="module")
def onnxruntime_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    bundle = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("memory") / "bundle"))
    build(BuildRequest(bundle, find_target("ort-cuda")), lambda *_: None)
    return engine_of(bundle, "ort-cuda")


def test_sessions_of_onnxruntime_share_weights_and_rows_grow_with_beams(onnxruntime_engine):
    engine = onnxruntime_engine
    one = estimate_device(engine, PICTURE)
    header = read_header(engine.bundle.path(engine.bundle.weights_file))
    assert one.vision + one.prefill + one.decode == sum(info.nbytes for info in header.values())
    beams = estimate_device(engine, replace(PICTURE, num_beams=3))
    spare = one.kv_cache // (2 * engine.bundle.model.num_hidden_layers)  # for beams that change places
    assert beams == replace(one, kv_cache=3 * one.kv_cache + spare, inputs_and_outputs=beams.inputs_and_outputs)
    assert beams.inputs_and_outputs > one.inputs_and_outputs


def test_it_is_what_check_said_before_the_export(onnxruntime_engine):
    made = exported(SMALLEST)
    with ModelSource.open(made.checkpoint, None) as source:
        said = check_model(source, made.recipe, find_target("ort-cuda")).memory
    found = estimate_device(onnxruntime_engine, replace(PICTURE, prompt_tokens=64))
    assert isinstance(said, DeviceEstimate)
    assert said.kv_cache == found.kv_cache
    for mine, theirs in ((found.workspace, said.workspace), (found.peak, said.peak - said.system)):
        assert mine == pytest.approx(theirs, rel=0.2)
