"""Calibration: the size of each vision expert's features, measured on the recipe's pictures, and what it is good for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moiie_runtime
from moiie_export.pipeline import ExportRequest, export_bundle, plan
from moiie_export.recipe import CalibrationSection
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.errors import MoiieError
from moiie_runtime.vision import encoder_inputs
from tests.exports import SMALLEST, exported, exported_mome, small_recipe
from tests.mome_layout import GOLDEN


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, ...]:
    """The golden picture, and a made-up one."""
    random = np.random.default_rng(0)
    made = tmp_path / "made.png"
    Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(made)
    return GOLDEN / "inputs" / "image_0.png", made


def calibrated(folder: Path, pictures: tuple[Path, ...]) -> ExportRequest:
    """A copy of the golden bundle, to be exported again with pictures: only the new stage has anything to do."""
    base = exported_mome(max_context=640)
    bundle = Path(shutil.copytree(base.bundle, folder / "bundle"))
    recipe = replace(base.recipe, calibration=CalibrationSection(pictures))
    return ExportRequest(base.checkpoint, bundle, recipe)


def test_sizes_are_measured_and_let_experts_be_skipped(tmp_path: Path, pictures: tuple[Path, ...]) -> None:
    request = calibrated(tmp_path, pictures)
    actions = {stage.name: stage.action for stage in plan(request).stages}
    assert actions.pop("calibration") == "run"
    assert set(actions.values()) == {"cached"}
    export_bundle(request)
    manifest = json.loads((request.output / "bundle.json").read_text(encoding="utf-8"))
    found = {expert["name"]: expert["mean_abs_feature"] for expert in manifest["vision_experts"]}
    with moiie_runtime.load(request.output, threads=1, skip_below=0.999) as vlm:
        prompts = [vlm.processor([{"role": "user", "content": [path, "What is this?"]}]) for path in pictures]
        for encoder in vlm.bundle.encoders:
            path = vlm.bundle.path(vlm.bundle.components[encoder.component].file)
            session = OnnxRuntimeSession(path, component=encoder.component, threads=1)
            inputs = [encoder_inputs(encoder, prompt.pictures[0]) for prompt in prompts]
            features = [session.run(each, ["image_features"])["image_features"][0] for each in inputs]
            expected = np.mean([np.abs(each[encoder.cls :]).mean() for each in features])
            assert found[encoder.name] == pytest.approx(expected, rel=1e-5)
        answer = vlm.generate(
            [{"role": "user", "content": [pictures[1], "What is this?"]}], max_new_tokens=1, num_beams=1
        )
    assert answer.instance is not None
    assert answer.instance.contributions is not None
    assert (answer.instance.contributions == 0).any()


def test_other_pictures_are_measured_again_and_equal_ones_are_not(tmp_path: Path, pictures: tuple[Path, ...]) -> None:
    request = calibrated(tmp_path, pictures)
    export_bundle(request)
    assert {stage.action for stage in plan(request).stages} == {"cached"}
    fewer = replace(request, recipe=replace(request.recipe, calibration=CalibrationSection(pictures[:1])))
    assert [stage.name for stage in plan(fewer).stages if stage.action == "run"] == ["calibration"]


def test_without_calibration_nothing_can_be_skipped() -> None:
    with pytest.raises(MoiieError, match="skip_below needs the calibration"):
        moiie_runtime.load(exported_mome(max_context=640).bundle, skip_below=0.1)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match=r"calibration\.images: .*none\.png: no such file"):
        plan(calibrated(tmp_path, (tmp_path / "none.png",)))


def test_a_model_that_weighs_nothing_refuses_pictures(tmp_path: Path, pictures: tuple[Path, ...]) -> None:
    recipe = replace(small_recipe(), calibration=CalibrationSection(pictures))
    with pytest.raises(MoiieError, match="one vision encoder, whose features nothing weighs"):
        plan(ExportRequest(exported(SMALLEST).checkpoint, tmp_path / "bundle", recipe))
