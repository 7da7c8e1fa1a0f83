"""Parity of bundles that are sound, and what a report says and leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moiie_export.parity import ParityCase, check_parity
from moiie_runtime.errors import MoiieError
from tests.conftest import GoldenCase
from tests.exports import exported, small_recipe
from tests.moiie_export.conftest import rewrite
from tests.moiie_export.parity.conftest import CONTEXT, SETTINGS, Model, Tensors, edit_manifest


def test_every_golden_bundle_is_its_checkpoint(golden: GoldenCase, golden_bundle: Callable[[str], Path]) -> None:
    report = check_parity(golden_bundle(golden.name), golden.checkpoint)
    assert report, report.summary()
    assert report.first_failure is None
    assert all(check.ran or check.stage == "expert values" for check in report.checks), report.summary()
    config = json.loads((golden.checkpoint / "config.json").read_text(encoding="utf-8"))
    for phase in ("prefill", "decode"):
        for case in ("picture", "text", "two pictures", "full cache"):
            hidden = [c for c in report.checks if (c.case, c.phase, c.stage) == (case, phase, "hidden states")]
            assert [check.layer for check in hidden] == list(range(config["num_hidden_layers"]))


def test_float16_bundle_is_compared_with_rounded_weights() -> None:
    """Both sides hold the same rounded weights, so the bounds are as tight as in float32."""
    made = exported(SETTINGS, "float16", CONTEXT)
    report = check_parity(made.bundle, made.checkpoint)
    assert report, report.summary()
    assert report.dtype == "float16"


def test_report_is_json_and_the_same_every_time(model: Model) -> None:
    reports = [model.parity(), model.parity()]
    first, second = (json.dumps(report.to_dict(), allow_nan=False, sort_keys=True) for report in reports)
    assert first == second
    assert str(model.base.checkpoint.parent) not in first


def test_data_for_plots(model: Model) -> None:
    report = model.parity().to_dict()
    assert [case["name"] for case in report["cases"]] == ["picture", "text", "two pictures"]
    picture = report["cases"][0]
    assert (picture["images"], picture["image_tokens"]) == (1, 4)
    prefill, decode = picture["prefill"], picture["decode"]
    assert [layer["layer"] for layer in prefill["layers"]] == [0, 1, 2, 3]
    sparse = prefill["layers"][1]
    assert sparse["errors"].keys() >= {"hidden states", "keys", "values", "router logits", "expert weights"}
    vision, language = (sparse["routing"][modality] for modality in ("vision", "language"))
    assert (vision["tokens"], language["tokens"]) == (3, picture["positions"] - 3)
    assert sum(language["margins"]) == language["tokens"]
    assert len(language["margins"]) == len(report["margin_edges"]) - 1
    assert sum(language["reached"]) == 2 * language["tokens"]
    assert language["reached"][0] == vision["reached"][3] == 0
    assert (language["bundle_reached"], vision["bundle_reached"]) == (language["reached"], vision["reached"])
    [[start, stop]] = picture["vision_spans"]
    assert (stop - start, stop <= picture["positions"]) == (3, True), "the last token of a picture is language"
    experts = {"num_experts": 4, "top_k": 2, "layers": [1, 3], "routed": True}
    groups = {"vision": [0, 1, 2], "language": [1, 2, 3]}
    assert report["model"]["moe"] == {**experts, "expert_groups": groups}
    assert report["model"]["num_hidden_layers"] == 4
    assert prefill["logits"]["positions"][-1] == picture["positions"] - 1
    assert len(prefill["logits"]["errors"]) == len(prefill["logits"]["positions"])
    assert len(decode["logits"]["errors"]) == report["decode_steps"]
    assert picture["text"]["bundle_ids"] == picture["text"]["reference_ids"]
    text = picture["text"]
    assert text["bundle_text"] == text["reference_text"] == text["shared_text"]
    assert text["bundle_token"] is text["reference_token"] is text["diverges"] is None


def test_summary_shows_every_stage(model: Model) -> None:
    text = model.parity().summary()
    for stage in ("files", "names", "manifest", "modality", "vision", "routing", "hidden states", "KV cache", "logits"):
        assert stage in text
    assert "FAIL" not in text


def test_progress_ends_where_it_should(model: Model) -> None:
    seen: list[tuple[str, int, int]] = []
    check_parity(model.base.bundle, model.base.checkpoint, progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["files", "cases", "weights"]
    assert all(done <= total for _, done, total in seen)
    assert [last for last in seen if last[0] == "cases"][-1][1] == [last for last in seen if last[0] == "cases"][-1][2]


def test_cases_of_the_caller(model: Model, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    cases = [ParityCase("Which colour is <image>?", (tmp_path / "red.png",)), ParityCase("And green?")]
    report = check_parity(model.base.bundle, model.base.checkpoint, cases=cases)
    assert report, report.summary()
    assert [case["question"] for case in report.to_dict()["cases"]] == ["Which colour is <image>?", "And green?"]
    with pytest.raises(MoiieError, match="missing.png"):
        check_parity(model.base.bundle, model.base.checkpoint, cases=[ParityCase("What?", (tmp_path / "missing.png",))])


def test_what_does_not_fit_is_named(model: Model) -> None:
    cases = [ParityCase("Why? " * CONTEXT), ParityCase("Why?")]
    report = check_parity(model.base.bundle, model.base.checkpoint, cases=cases)
    assert report, report.summary()
    skipped = {check.case or check.stage: check.note for check in report.checks if not check.ran}
    assert f"the bundle holds {CONTEXT}" in skipped["case 1"]
    assert skipped["batch"] == "not run: it takes two cases"
    assert "4 not run" in report.verdict(), "the experts that only pictures reach are named too"
    report = check_parity(model.base.bundle, model.base.checkpoint, cases=cases[:1])
    assert not report, "a full cache alone proves nothing about prompts"
    assert report.first_failure is not None
    assert report.first_failure.note == "no case could be run"


def test_recipe_cases_without_their_pictures_are_named(model: Model) -> None:
    bundle = model.copy_bundle()
    stored = [{"prompt": "What is this?", "images": ["cat.png"]}, {"prompt": "Why?", "images": []}]
    edit_manifest(bundle, lambda manifest: manifest["recipe"]["parity"].update(cases=stored))
    report = model.parity(bundle)
    assert report, report.summary()
    assert any("cat.png did not travel" in check.note for check in report.checks if not check.ran)
    assert [case["name"] for case in report.to_dict()["cases"]] == ["picture", "text", "two pictures", "case 1"]
    assert "1 not run" in report.verdict()


def test_bounds_are_those_of_the_bundle(model: Model) -> None:
    bundle = model.copy_bundle()

    def bound(**changes: Any) -> None:
        edit_manifest(bundle, lambda manifest: manifest["recipe"]["parity"]["bounds"]["float32"].update(changes))

    bound(hidden_error=1e-12)
    report = model.parity(bundle)
    assert report.first_failure is not None
    assert report.first_failure.bound == 1e-12
    bound(hidden_error="small")
    with pytest.raises(MoiieError, match="expected a number for each of"):
        model.parity(bundle)


def tied(sign: float) -> Callable[[Tensors], Tensors]:
    """Layer 1's last two gate rows almost equal: rounding by 1e-7 decides which of them is second best."""

    def change(tensors: Tensors) -> Tensors:
        changed = dict(tensors)
        for gate in ("gate", "gate_vis"):
            name = f"model.layers.1.mlp.{gate}.weight"
            rows = tensors[name].copy()
            rows[0] *= np.float32(3)
            rows[2] = rows[1] * np.float32(1 + sign * 1e-6)
            changed[name] = rows
        return changed

    return change


def test_ties_are_followed_counted_and_bounded(model: Model) -> None:
    """Many tokens go to other experts, each by a hair: only their number is wrong, and nothing behind them differs."""
    bundle = model.with_tensors(tied(1.0))
    checkpoint = model.copy_checkpoint("other")
    rewrite(checkpoint, tied(-1.0))
    report = check_parity(bundle, checkpoint)
    failed = {check.stage for check in report.failures}
    assert failed == {"ties", "stored weights"}, report.summary()
    ties = [check for check in report.checks if check.stage == "ties"]
    assert any(check.value and check.value > 0.01 for check in ties)
    assert "ties" in next(c.note for c in report.checks if c.stage == "routing" and c.layer == 1 and c.case == "text")
    everything = {"tie_fraction": 1.0}
    edit_manifest(bundle, lambda manifest: manifest["recipe"]["parity"]["bounds"]["float32"].update(everything))
    relaxed = check_parity(bundle, checkpoint)
    assert {check.stage for check in relaxed.failures} == {"stored weights"}
    assert {check.status for check in relaxed.checks if check.stage == "ties" and check.value} == {"near"}
    strict = {"tie_margin": 0.0}
    edit_manifest(bundle, lambda manifest: manifest["recipe"]["parity"]["bounds"]["float32"].update(strict))
    first = check_parity(bundle, checkpoint).first_failure
    assert first is not None
    assert (first.stage, first.layer) == ("routing", 1)


def test_experts_that_no_prompt_reaches_are_named(model: Model) -> None:
    """A gate row that never wins: its expert's values are not judged, and the report says so."""

    def starve(tensors: Tensors) -> Tensors:
        name = "model.layers.3.mlp.gate_vis.weight"
        rows = tensors[name].copy()
        rows[2] = rows[1]
        rows[0] = 2 * rows[1]
        return tensors | {name: rows}

    bundle = model.with_tensors(starve)
    report = check_parity(bundle, model.folder / "changed" / "checkpoint")
    missed = [check for check in report.checks if check.stage == "expert values"]
    assert all(check.where == "layer 3 vision" for check in missed if check.layer == 3)
    reached = [case["prefill"]["layers"][3]["routing"]["vision"]["reached"] for case in report.to_dict()["cases"]]
    absent = [expert for expert in range(3) if not sum(counts[expert] for counts in reached)]
    named = [check for check in missed if check.layer == 3 and "vision" in check.where]
    assert bool(named) == bool(absent)


def test_recipe_of_the_shared_tests_is_the_default() -> None:
    """The bounds these tests are judged by are the shipped ones."""
    assert small_recipe().parity.bounds.float32.hidden_error <= 2e-4
