"""`moiie export`: which checkpoint and recipe are meant, and what is said about it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Moiie
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "moiie_phi3" / "checkpoint"


def test_dry_run_shows_the_stages_and_writes_nothing(moiie: Moiie, tmp_path: Path) -> None:
    result = moiie("export", CHECKPOINT, "-o", tmp_path / "b", "--dry-run")
    assert result.code == 0
    assert result.out.splitlines()[0].split()[:2] == ["weights", "run"]
    document = moiie("export", CHECKPOINT, "-o", tmp_path / "b", "--dry-run", "--json").document
    assert {each["action"] for each in document["stages"]} == {"run"}
    assert document["bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_finished_bundle_is_cached_and_options_redo_what_they_change(
    moiie: Moiie, tmp_path: Path, golden_bundle: Callable[[str], Path]
) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(golden_bundle("moiie_phi3"), bundle)
    result = moiie("export", CHECKPOINT, "-o", bundle)
    assert (result.code, result.out) == (0, f"{bundle}\n")
    again = moiie("export", CHECKPOINT, "-o", bundle, "--json").document
    assert {each["action"] for each in again["stages"]} == {"cached"}
    assert again["bundle"] == str(bundle)
    assert "onnx/decoder_prefill.onnx" in again["files"]

    def redone(*more: object) -> set[str]:
        stages = moiie("export", CHECKPOINT, "-o", bundle, "--dry-run", "--json", *more).document["stages"]
        return {each["name"] for each in stages if each["action"] == "run"}

    graphs = {"vision_encoder", "decoder_prefill", "decoder_decode"}
    assert redone() == set()
    # The README among the files gives commands with the graphs' shapes.
    assert {"decoder_prefill", "decoder_decode", "files"} <= redone("--max-context", 900) <= {*graphs, "files"}
    assert redone("--dtype", "float16") == {"weights", "files", *graphs}
    assert redone("--force") == {"weights", "files", *graphs}


def test_a_recipe_may_name_the_checkpoint_relative_to_itself(moiie: Moiie, tmp_path: Path) -> None:
    case = tmp_path / "case"
    shutil.copytree(GOLDEN / "moiie_phi3", case)
    recipe = tmp_path / "my.yaml"
    recipe.write_text("schema: 1\nextends: default\nmodel: {checkpoint: case/checkpoint}\n", encoding="utf-8")
    assert moiie("export", recipe, "-o", tmp_path / "b", "--dry-run").code == 0


def test_a_shipped_recipe_takes_the_checkpoint_from_the_command_line(moiie: Moiie, tmp_path: Path) -> None:
    result = moiie("export", "moiie-phi3", "-o", tmp_path / "b", "--dry-run")
    assert (result.code, result.error) == (1, "recipe moiie-phi3 names no checkpoint")
    assert "--checkpoint DIR" in result.hint
    result = moiie("export", "moiie-phi3", "--checkpoint", CHECKPOINT, "-o", tmp_path / "b", "--dry-run")
    assert result.code == 0


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "nowhere",
            "nowhere: neither a checkpoint nor a recipe; looked for a checkpoint (nowhere/config.json) and a shipped",
        ),
        (
            "no/where",
            "no/where: neither a checkpoint nor a recipe; looked for a checkpoint (no/where/config.json) and a recipe",
        ),
        ("no.yaml", "no.yaml: no such recipe file"),
        ("empty", "empty: no checkpoint, it has no config.json"),
        ("file.bin", "file.bin: a checkpoint is a directory, this is a file"),
    ],
)
def test_a_source_that_is_neither(
    moiie: Moiie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    result = moiie("export", source, "-o", "b")
    assert (result.code, result.out) == (1, "")
    assert result.error.startswith(error)
    assert result.hint
    assert not (tmp_path / "b").exists()


def test_two_checkpoints_and_a_missing_tower_are_refused(moiie: Moiie, tmp_path: Path) -> None:
    result = moiie("export", CHECKPOINT, "--checkpoint", CHECKPOINT, "-o", tmp_path / "b")
    assert result.error.startswith("two checkpoints: ")
    result = moiie("export", CHECKPOINT, "--vision-tower", tmp_path / "none", "-o", tmp_path / "b")
    assert result.error == f"--vision-tower {tmp_path / 'none'}: no such directory"


def test_an_invalid_recipe_exits_3_with_all_problems(moiie: Moiie, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("schema: 1\nexport: {dtype: int4}\nx: 1\n", encoding="utf-8")
    result = moiie("export", recipe, "-o", tmp_path / "b")
    assert result.code == 3
    assert result.error.startswith("2 problems in the recipe")


def test_without_the_export_extra_it_says_how_to_install_it(
    moiie: Moiie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiie_export.cli.sources.find_spec", lambda name: None if name == "torch" else object())
    result = moiie("export", CHECKPOINT, "-o", tmp_path / "b")
    assert (result.code, result.error) == (4, "this needs packages that are not installed: torch")
    assert "pip install 'moiie-export[export]'" in result.hint
