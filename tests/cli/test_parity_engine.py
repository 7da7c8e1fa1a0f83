"""`moiie parity --target` of engines on an emulated GPU: TensorRT's compute what their graphs, precision and banks say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from moiie_export.builders import BuildRequest
from moiie_export.builders import build as build_target
from moiie_export.parity import decoder_stage
from moiie_export.stages import file_record
from moiie_export.targets import find_target
from moiie_runtime.tensors import read_header
from tests.cli.conftest import Moiie
from tests.exports import smallest_with_room
from tests.host_device import emulate
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt
from tests.runtime.backends.engine_bundle import build, edit, write_plans

HIDDEN_STAGES = {"hidden states", "tower features", "batch", "names, shapes, dtypes, attributes"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target `rtx` computes its graphs in float16; `two` the bundle's own, with two rows in bfloat16."""
    copy = Path(shutil.copytree(smallest_with_room().bundle, tmp_path_factory.mktemp("parity") / "bundle"))
    build(copy, "rtx", {"prefill": (32, 128)}, dialect=True)
    build(copy, "two", {"prefill": (128,), "batch": 2, "precision": "bfloat16"})
    build_target(BuildRequest(copy, find_target("ort-cuda")), lambda *_: None)
    return copy


@pytest.fixture
def one_case(tmp_path: Path) -> Path:
    """A recipe with one picture and a question."""
    Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)).save(tmp_path / "a.png")
    path = tmp_path / "one.yaml"
    path.write_text("schema: 1\nparity: {cases: [{prompt: 'What?', images: [a.png]}]}\n", encoding="utf-8")
    return path


def parity(moiie: Moiie, bundle: Path, target: str, *more: object) -> Any:
    result = moiie(
        "parity", bundle, "--checkpoint", smallest_with_room().checkpoint, "--target", target, "--json", *more
    )
    assert result.out, result.err
    return result, result.document


def test_an_engine_is_the_checkpoint(
    trt: EmulatedTensorRt, engines: Path, moiie: Moiie, one_case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt longer than a profile; logits of many positions, though a run gives one; what is not seen is named."""
    monkeypatch.setattr(decoder_stage, "KEPT", 12)
    page = one_case.with_suffix(".html")
    result, document = parity(moiie, engines, "rtx", "--recipe", one_case, "--report", page)
    assert result.code == 0, result.err
    assert page.stat().st_size > 10000
    ran = {(each["phase"], each["stage"]) for each in document["checks"] if each["status"] != "not run"}
    both = {(phase, stage) for phase in ("prefill", "decode") for stage in ("routing", "KV cache", "logits")}
    assert {*both, ("vision_encoder", "vision"), ("", "text"), ("", "answer logits")} <= ran
    assert {each["stage"] for each in document["checks"] if each["status"] == "not run"} == HIDDEN_STAGES
    errors = [each["value"] for each in document["checks"] if each["metric"] == "error" and each["case"]]
    assert 0 < max(errors) < 0.01, "float16 rounds"
    for case in document["cases"]:
        assert len(case["prefill"]["logits"]["positions"]) == 12 < case["positions"]
    assert not any(trt.cuda.left.values())


def test_several_rows_are_compared_as_a_batch(
    trt: EmulatedTensorRt, engines: Path, moiie: Moiie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_stage, "KEPT", 3)
    result, document = parity(moiie, engines, "two")
    assert result.code == 0, result.err
    batch = {each["case"] for each in document["checks"] if each["case"].startswith("batch of")}
    assert batch == {"batch of picture + text, row 0", "batch of picture + text, row 1"}


def test_onnxruntime_on_a_device(engines: Path, moiie: Moiie, monkeypatch: pytest.MonkeyPatch, one_case: Path) -> None:
    devices = emulate(monkeypatch)
    result, _ = parity(moiie, engines, "ort-cuda", "--recipe", one_case)
    assert result.code == 0, result.err
    assert all(device.closed and not device.held for device in devices)


def signed(bundle: Path, name: str) -> None:
    """Put a changed file's size and digest into engine.json."""
    document = json.loads((bundle / "engines" / "rtx" / "engine.json").read_text(encoding="utf-8"))
    record = file_record(bundle / "engines" / "rtx" / name)
    edit(bundle, "rtx", files=document["files"] | {name: record})


def other_experts(folder: Path) -> str:
    """One expert for vision in the last layer: it shows in logits alone, and at the picture's positions alone."""
    info = read_header(folder / "banks.safetensors")["experts.0.vision.gate_up"]
    numbers = np.memmap(folder / "banks.safetensors", np.float16, "r+", info.offset, info.shape)
    numbers[-1] *= -1
    numbers.flush()
    return "banks.safetensors"


def other_step(folder: Path) -> str:
    path = folder / "graphs" / "decoder_decode.onnx"
    model = onnx.load(path, load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    next(each for each in norm.attribute if each.name == "epsilon").f = 10.0
    onnx.save(model, path)
    return "graphs/decoder_decode.onnx"


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (other_experts, ("prefill", "logits")),
        (other_step, ("decode", "router logits")),
    ],
)
def test_a_fault_exits_3_and_its_stage_is_named(
    trt: EmulatedTensorRt, engines: Path, tmp_path: Path, moiie: Moiie, one_case: Path, damage: Any, found: Any
) -> None:
    bundle = Path(shutil.copytree(engines, tmp_path / "bundle"))
    name = damage(bundle / "engines" / "rtx")
    write_plans(bundle, "rtx", dialect=True)  # they hold paths
    result, document = parity(moiie, bundle, "rtx", "--recipe", one_case)
    assert (result.code, document["first_failure"]["stage"]) == (3, "files")
    signed(bundle, name)
    result, document = parity(moiie, bundle, "rtx", "--recipe", one_case)
    first = document["first_failure"]
    assert (result.code, first["phase"], first["stage"]) == (3, *found), document["verdict"]
    assert "as built for rtx is not the model of" in result.error
    assert "--bisect --target rtx" in result.hint


def test_polygraphy_compares_engines_too(engines: Path, moiie: Moiie, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = emulate(monkeypatch)
    result, document = parity(moiie, engines, "ort-cuda", "--polygraphy")
    assert result.code == 0, result.err
    assert {each["where"] for each in document["checks"]} == {"vision_encoder", "decoder_prefill", "decoder_decode"}
    assert all(device.closed and not device.held for device in devices)


def test_a_run_says_what_the_gpu_will_hold(trt: EmulatedTensorRt, engines: Path, moiie: Moiie) -> None:
    result = moiie("run", engines, "--target", "rtx", "--raw", "-p", "Hello", "--max-new-tokens", "2")
    assert result.code == 0, result.err
    assert "on the GPU (" in result.err
    trt.cuda.total = 1 << 10
    result = moiie("run", engines, "--target", "rtx", "--raw", "-p", "Hello")
    assert (result.code, "exceeds the free memory of Emulated GPU" in result.error) == (4, True)
