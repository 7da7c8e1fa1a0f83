"""`moiie parity`: the verdict, its exit code, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export.cli.parity import _finding
from moiie_export.parity.report import Report, judge
from moiie_export.report import render
from tests.cli.conftest import Moiie
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "moiie_phi3" / "checkpoint"


@pytest.fixture
def bundle(golden_bundle: object) -> Path:
    assert callable(golden_bundle)
    path: Path = golden_bundle("moiie_phi3")
    return path


def reported(monkeypatch: pytest.MonkeyPatch, error: float) -> dict[str, object]:
    """Lets check_parity report one hidden state with this error; returns what it was asked."""
    asked: dict[str, object] = {}

    def check_parity(bundle: Path, checkpoint: Path, **more: object) -> Report:
        asked.update(bundle=bundle, checkpoint=checkpoint, **more)
        place = {"case": "picture", "phase": "prefill", "where": "layer 1", "layer": 1}
        return Report("b", "c", "float32", [judge("hidden states", "error", error, 2e-4, **place)])

    monkeypatch.setattr("moiie_export.parity.check_parity", check_parity)
    return asked


def test_a_passing_report_exits_0(moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = reported(monkeypatch, 1e-6)
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--vision-tower", "tower")
    assert (result.code, result.err) == (0, "")
    assert "hidden states" in result.out
    assert (asked["bundle"], asked["checkpoint"], asked["vision_tower"]) == (bundle, CHECKPOINT, Path("tower"))
    assert asked["cases"] is None


def test_a_failing_report_exits_3_and_names_the_first_difference(
    moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported(monkeypatch, 0.5)
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT)
    assert result.code == 3
    assert "is not the model of" in result.error
    assert "layer 1" in result.error
    assert "FAIL" in result.out
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--json")
    assert result.code == 3
    assert result.document["passed"] is False


def test_cases_come_from_a_recipe(moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = reported(monkeypatch, 0.0)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schema: 1\nparity: {cases: [{prompt: p, images: [a.png]}]}\n", encoding="utf-8")
    assert moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--recipe", recipe).code == 0
    [case] = asked["cases"]  # type: ignore[misc]
    assert (case.prompt, case.images) == ("p", (tmp_path / "a.png",))


def test_a_report_is_written_when_parity_holds(
    moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reported(monkeypatch, 1e-6)
    page = tmp_path / "made" / "report.html"
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--report", page, "--json")
    assert (result.code, result.err.strip()) == (0, f"written: {page}")
    assert result.document["passed"] is True
    assert page.read_text(encoding="utf-8") == render(result.document), "the page can be made again from the document"


def test_a_report_is_written_when_parity_fails_and_the_error_names_it(
    moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    reported(monkeypatch, 0.5)
    page, pictures = tmp_path / "report.html", tmp_path / "pictures"
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--report", page, "--png", pictures)
    assert result.code == 3
    assert f"see {page} and 1 picture in {pictures}" in result.error
    assert "is not the model of its checkpoint" in page.read_text(encoding="utf-8")
    assert [path.name for path in pictures.iterdir()] == ["error-by-layer.png"]


def test_what_a_report_cannot_be_written_to_is_refused_before_anything_runs(
    moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = reported(monkeypatch, 0.0)
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--report", tmp_path)
    assert (result.code, result.error) == (1, f"{tmp_path}: is a directory")
    monkeypatch.setattr("moiie_export.cli.sources.find_spec", lambda name: None if name == "matplotlib" else object())
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--png", tmp_path / "pictures")
    assert (result.code, result.error) == (4, "this needs packages that are not installed: matplotlib")
    assert "pip install 'moiie-export[report]'" in result.hint
    assert not asked
    assert not (tmp_path / "pictures").exists()


def test_refusals(moiie: Moiie, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = moiie("parity", tmp_path / "none", "--checkpoint", CHECKPOINT)
    assert (result.code, result.error) == (1, f"{tmp_path / 'none'}: no such bundle")
    result = moiie("parity", bundle, "--checkpoint", tmp_path / "none")
    assert (result.code, result.error) == (1, f"{tmp_path / 'none'}: no such checkpoint directory")
    result = moiie("parity", bundle, "--checkpoint", bundle.parent)
    assert result.error.endswith("no checkpoint, it has no config.json")
    monkeypatch.setattr("moiie_export.cli.sources.find_spec", lambda name: None if name == "onnx" else object())
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT)
    assert (result.code, result.error) == (4, "this needs packages that are not installed: onnx")


def test_ranges_are_shown_and_compare_nothing(moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = reported(monkeypatch, 0.5)
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--ranges")
    assert result.code == 0, result.err
    assert not asked
    assert "everything fits float16 (65504, with a margin of 2)" in result.out
    assert "decoder.layers.0  " in result.out
    assert "made-up pictures" in result.err
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--ranges", "--json")
    assert result.document["islands"] == []
    assert {each["kind"] for each in result.document["tensors"]} == {"input", "output", "residual", "scores"}
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--ranges", "--report", "r.html")
    assert result.code == 2
    assert "leave --report and --png out" in result.error


def test_ranges_name_the_islands_for_a_recipe(
    moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moiie_export.model.ranges import OUTPUT, Range, Ranges

    name = "decoder.layers.1.mlp.experts.0.down_proj"
    found = Ranges([Range(name, OUTPUT, 1, {"vision": 7e4}), Range("b", OUTPUT, 1, {"language": 1.0})], ["case 1"])
    monkeypatch.setattr("moiie_export.model.ranges.measure_ranges", lambda *_: found)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schema: 1\nparity: {cases: [{prompt: p}]}\n", encoding="utf-8")
    result = moiie("parity", bundle, "--checkpoint", CHECKPOINT, "--ranges", "--recipe", recipe)
    assert result.code == 0
    assert f"export:\n  islands:\n    - {name}\n" in result.out
    assert "overflows" in result.out
    assert "made-up" not in result.err


@pytest.mark.parametrize(
    ("stages", "target", "finding", "hint"),
    [
        (["files", "logits"], None, "is not the model of", "copy the bundle again"),
        (["logits"], None, "is not the model of", "export the bundle again"),
        (["logits"], "rtx", "is not the model of", "--bisect --target rtx"),
        (["quantised logits", "quantised routing"], None, "more than its recipe allows", "parity.bounds"),
        (["quantised logits"], "cpu", "more than its recipe allows", "quantization.rules"),
        (["quantised weights"], None, "is not the model of", "export the bundle again"),
        (["quantised logits", "logits"], None, "is not the model of", "export the bundle again"),
    ],
)
def test_the_hint_is_about_what_failed(stages: list[str], target: str | None, finding: str, hint: str) -> None:
    report: Any = SimpleNamespace(failures=[SimpleNamespace(stage=stage) for stage in stages])
    found = _finding(report, Path("a.bundle"), Path("a"), target)
    assert finding in found[0]
    assert hint in found[1]
