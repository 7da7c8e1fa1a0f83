"""An export that calibrates: what lands in the manifest, what is not measured twice, and what is refused first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moiie_export.cli.quantization import quantization_lines, quantization_summary
from moiie_export.model import ranges
from moiie_export.parity import check_parity
from moiie_export.pipeline import ExportRequest, export_bundle, plan
from moiie_export.quantize import calibration
from moiie_export.recipe import CalibrationSection, Recipe
from moiie_export.recipe_parity import ParityCase
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile
from tests.exports import small_recipe
from tests.synthetic import write_checkpoint
from tests.tracing import traced_once

ISLAND = "decoder.layers.0.self_attn.o_proj.weight"
RULES = (
    QuantRule(("experts",), "int4", 32, "awq"),
    QuantRule(("attention", "lm_head"), "int8", 32, "gptq"),
)


@pytest.fixture(autouse=True)
def _one_model() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture
def request_(tmp_path: Path) -> ExportRequest:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", layers=1, moe_layers="all", vocab=288, hidden=32, intermediate=64, dtype="F32"
    )
    pixels = np.random.default_rng(3).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return ExportRequest(checkpoint, tmp_path / "bundle", recipe(tmp_path / "noise.png"))


def recipe(picture: Path) -> Recipe:
    """AWQ and GPTQ on two prompts, an island, and more tokens wanted than a picture of four has."""
    base = small_recipe("float16", max_context=256)
    return replace(
        base,
        export=replace(base.export, islands=(ISLAND, "auto")),
        calibration=CalibrationSection(cases=(ParityCase("What is this?", (picture,)), ParityCase("Name a colour."))),
        quantization=QuantizationSection(RULES, min_tokens=10),
    )


def test_an_export_that_calibrates(request_: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    export_bundle(request_, lambda stage, *_: seen.append(stage))
    assert "calibration" in seen
    manifest = json.loads((request_.output / "bundle.json").read_text(encoding="utf-8"))
    section = manifest["quantization"]
    assert section["islands"] == [ISLAND]
    counts = section["coverage"]["0"]
    assert sum(counts["0"].values()) < 10 <= sum(counts["1"].values())
    starved = {name: why for name, why in section["fallbacks"].items() if ".experts.0." in name}
    assert set(starved) == {f"decoder.layers.0.mlp.experts.0.{kind}_proj" for kind in ("gate_up", "down")}
    few = sum(counts["0"].values())
    reason = f"saw {few} inputs of this layer, fewer than quantization.min_tokens: 10" if few else "saw no inputs"
    assert all(reason in why for why in starved.values())
    with TensorFile(request_.output / "onnx" / "weights.safetensors") as file:
        assert file.header[ISLAND].dtype == "F32"
        assert file.header["decoder.layers.0.self_attn.qkv_proj.weight"].dtype == "I8"
    assert not [path for path in request_.output.rglob("*") if "statistics" in path.name], "only for the export itself"
    lines = "\n".join(quantization_lines(quantization_summary(manifest) or {}, 10))
    assert "as int4 in groups of 32 by awq" in lines
    assert f"float32 islands: 1\n  {ISLAND}" in lines
    assert "fewer than 10" in lines
    monkeypatch.setattr(ranges, "measure_ranges", lambda *_: pytest.fail("measured again"))
    assert {stage.action for stage in plan(request_).stages} == {"cached"}
    assert {stage.action for stage in export_bundle(request_).stages} == {"cached"}
    bounds = {"logits_error": 2.0, "routing_agreement": 0.3, "top1_agreement": 0.0}
    manifest["recipe"]["parity"]["bounds"]["int4"].update(bounds)
    (request_.output / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    report = check_parity(request_.output, request_.checkpoint)
    assert report, report.summary()


def test_ranges_are_measured_once_and_never_by_a_dry_run(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def measure(*given: Any) -> SimpleNamespace:
        calls.append(given)
        return SimpleNamespace(islands=[ISLAND])

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranges, "measure_ranges", measure)
    monkeypatch.setattr("moiie_export.statistics_stage.write_weights", interrupt)
    base = replace(request_.recipe, quantization=QuantizationSection())
    recipe = replace(base, export=replace(base.export, islands=("auto",)))
    request = replace(request_, recipe=recipe)
    planned = plan(request)
    assert not calls
    assert [(each.name, each.action) for each in planned.stages[:2]] == [("ranges", "run"), ("weights", "run")]
    assert "not measured yet" in planned.stages[1].reason
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            export_bundle(request)
        assert len(calls) == 1
    assert plan(request).stages[0].action == "cached"
    cases = recipe.calibration.cases[:1]
    with pytest.raises(KeyboardInterrupt):
        export_bundle(replace(request, recipe=replace(recipe, calibration=CalibrationSection(cases=cases))))
    assert len(calls) == 2, "other prompts are measured"
    with pytest.raises(KeyboardInterrupt):
        export_bundle(replace(request, force=True))
    assert len(calls) == 3


def test_an_interrupted_export_does_not_calibrate_again(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moiie_export.statistics_stage.write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(request_)
    calls: list[Any] = []
    real = calibration.collect
    monkeypatch.setattr(calibration, "collect", lambda *given: calls.append(given) or real(*given))
    monkeypatch.setattr("moiie_export.pipeline.write_graph", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(request_)
    assert not calls, "the weights are written; what they were measured by lies beside them"
    more = replace(request_.recipe.calibration, cases=request_.recipe.calibration.cases[:1])
    with pytest.raises(KeyboardInterrupt):
        export_bundle(replace(request_, recipe=replace(request_.recipe, calibration=more)))
    assert len(calls) == 1, "other prompts are measured"


def test_what_cannot_be_calibrated_is_refused_before_anything_is_done(request_: ExportRequest) -> None:
    def refused(*cases: ParityCase) -> str:
        named = replace(request_.recipe.export, islands=(ISLAND,))
        changed = replace(request_.recipe, export=named, calibration=CalibrationSection(cases=cases))
        with pytest.raises(MoiieError) as caught:
            plan(replace(request_, recipe=changed))
        return caught.value.message

    assert "calibration.cases: empty" in refused()
    assert "nothing reaches expert 0 of layer 0" in refused(ParityCase("What?"))
    assert "none.png: no such file" in refused(ParityCase("What?", (Path("/none.png"),)))
    assert not request_.output.exists()
