"""The prediction of a GPU's memory against every allocation that the emulated GPU saw: never less, and not much more.

The weights of engines and what graphs work with are the emulation's own here, and left out on both sides.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moiie_runtime as mr
from moiie_export.builders import BuildRequest
from moiie_export.builders import build as build_target
from moiie_export.check.memory import predict_memory
from moiie_export.check.model_ops import stored_weights
from moiie_export.quantize.rules import resolve
from moiie_export.source import ModelSource
from moiie_export.targets import find_target
from moiie_runtime.bundle import Bundle
from moiie_runtime.device_memory import DeviceEstimate, estimate_device
from moiie_runtime.engines import Engine, open_engine
from moiie_runtime.memory import Request
from moiie_runtime.tensors import read_header
from tests.exports import exported_mome
from tests.host_device import emulate
from tests.runtime.backends.engine_bundle import CONSTANTS, WORKSPACE

PICTURE = Path(__file__).parents[2] / "golden" / "moiie_phi3" / "inputs" / "image_0.png"


def ask(bundle: Path, target: str, beams: int) -> DeviceEstimate:
    """Two questions about pictures, so that what the second begins with is there too; the prediction of the second."""
    found = []
    with mr.load(bundle, target=target, threads=1, feature_cache=0) as vlm:
        for text in ("What?", "What is shown in the picture?"):
            prompt = vlm.processor([{"role": "user", "content": [PICTURE, text]}])
            vlm.generate_prompt(prompt, max_new_tokens=3, num_beams=beams)
            request = Request(prompt_tokens=prompt.length, new_tokens=3, images=1, num_beams=beams)
            found.append(vlm.predicted_memory(request))
    return found[-1]


@pytest.mark.parametrize(
    ("model", "target", "rows"),
    [
        ("engine_bundle", "rtx", 1),
        ("engine_bundle", "small", 1),
        ("engine_bundle", "four", 4),
        ("engine_bundle", "copying", 1),
        ("mome_engines", "one", 1),
        ("mome_engines", "two", 2),
    ],
)
def test_every_allocation_was_predicted(
    trt: Any, request: pytest.FixtureRequest, model: str, target: str, rows: int
) -> None:
    bundle: Path = request.getfixturevalue(model)
    trt.cuda.total = 1 << 30
    predicted = ask(bundle, target, rows)
    sizes = Bundle.open(bundle)
    buffers = sum(
        getattr(predicted, part) for part in ("language_experts", "vision_experts", "kv_cache", "inputs_and_outputs")
    )
    seen = trt.cuda.peak - WORKSPACE - CONSTANTS * len(sizes.phases)
    # Beams need the spare row only when they change places.
    spare = 0 if rows == 1 else buffers // (2 * sizes.model.num_hidden_layers * rows)
    assert seen <= buffers <= seen + seen // 100 + spare
    assert not any(trt.cuda.left.values())


def test_buffers_for_onnxruntime_were_predicted(
    monkeypatch: pytest.MonkeyPatch, mome_engines: Path, tmp_path: Path
) -> None:
    """Its sessions place weights and results by themselves."""
    bundle = Path(shutil.copytree(mome_engines, tmp_path / "b"))
    build_target(BuildRequest(bundle, find_target("ort-cuda")), lambda *_: None)
    opened = emulate(monkeypatch)
    predicted = ask(bundle, "ort-cuda", 2)
    [device] = opened
    assert device.peak <= predicted.kv_cache + predicted.inputs_and_outputs <= 1.5 * device.peak


def engine(bundle: Path, target: str) -> Engine:
    return open_engine(Bundle.open(bundle), target)


def test_the_parts_of_mome_are_those_of_its_files(mome_engines: Path) -> None:
    """Adapters lie on the device once for each decoder graph and row; encoders leave after the prompt, the router stays."""
    bundle = Bundle.open(mome_engines)
    header = read_header(bundle.path(bundle.weights_file))
    adapters = sum(info.nbytes for name, info in header.items() if name.startswith("mole."))
    assert bundle.adapters is not None
    one = adapters // bundle.adapters.num_experts // 4 * 2  # float32 in the file
    text = Request(prompt_tokens=1, images=0)
    found = {name: estimate_device(engine(mome_engines, name), text) for name in ("one", "two")}
    assert 2 * one <= found["one"].inputs_and_outputs < 2 * one + 8192
    assert 4 * one <= found["two"].inputs_and_outputs < 4 * one + 12288
    assert found["one"].router == engine(mome_engines, "one").bundle.files["engines/one/router.engine"].bytes
    pictured = estimate_device(engine(mome_engines, "two"), replace(text, images=1))
    assert pictured.vision > found["two"].vision == 0
    assert pictured.answering(True) == pictured.peak - pictured.vision


def test_check_says_so_before_the_export(mome_engines: Path) -> None:
    made = exported_mome(640)
    target = replace(find_target("rtx"), prefill=(64, 256))
    with ModelSource.open(made.checkpoint, None) as source:
        config = source.config
        resolved = resolve(made.recipe.quantization, made.recipe.export.dtype, source.weight_map, config)
        weights = stored_weights(config, resolved)
        said = predict_memory(config, weights, target, 640)
    found = estimate_device(engine(mome_engines, "one"), Request(prompt_tokens=256, images=1))
    for part in ("inputs_and_outputs", "kv_cache"):
        assert getattr(said, part) == pytest.approx(getattr(found, part), rel=0.25), part
    assert said.router == 2 * sum(each.elements for each in weights if each.graphs == {"router"}) > 0
