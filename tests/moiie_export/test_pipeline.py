"""Exporting again: what is left alone, what only changes the manifest, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from moiie_export import pipeline
from moiie_export.pipeline import ExportRequest, ExportResult, export_bundle
from moiie_export.recipe import Recipe
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from tests.exports import SMALLEST, exported


@dataclass
class Copy:
    """A copy of a checkpoint and of its bundle, in a folder of their own."""

    folder: Path
    recipe: Recipe

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.bundle / "bundle.json").read_text(encoding="utf-8"))
        return manifest

    def export(self, recipe: Recipe | None = None, **options: Any) -> ExportResult:
        return export_bundle(ExportRequest(self.folder / "checkpoint", self.bundle, recipe or self.recipe, **options))

    def state(self) -> dict[str, tuple[int, int]]:
        """Path -> inode and time of change of everything in the folder."""
        stats = {path: path.stat() for path in sorted(self.folder.rglob("*"))}
        return {str(path.relative_to(self.folder)): (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    original = exported({**SMALLEST, "dtype": "F32"})
    for part in ("checkpoint", "bundle", "vision_tower"):
        shutil.copytree(original.bundle.parent / part, tmp_path / part)
    return Copy(tmp_path, original.recipe)


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object) -> None:
        raise AssertionError(f"{name} was traced again")

    monkeypatch.setattr(pipeline, "write_graph", refuse)


def _actions(result: ExportResult) -> dict[str, str]:
    return {plan.name: plan.action for plan in result.stages if plan.action == "run"}


def test_exporting_again_touches_nothing(copy: Copy, no_tracing: None) -> None:
    before = copy.state()
    result = copy.export()
    assert _actions(result) == {}
    assert result.files == copy.manifest["files"]
    assert copy.state() == before


def test_another_default_changes_the_manifest_alone(copy: Copy, no_tracing: None) -> None:
    generation = replace(copy.recipe.generation, max_new_tokens=7)
    before, weights = copy.manifest, (copy.bundle / "onnx" / "weights.safetensors").stat().st_ino
    assert _actions(copy.export(replace(copy.recipe, generation=generation))) == {}
    after = copy.manifest
    assert after["generation"]["max_new_tokens"] == 7
    assert {key for key in after if after[key] != before[key]} == {"generation", "recipe"}
    assert (copy.bundle / "onnx" / "weights.safetensors").stat().st_ino == weights
    assert sorted(path.name for path in copy.folder.iterdir()) == ["bundle", "checkpoint", "vision_tower"]


def test_another_chat_template_writes_the_text_files_alone(copy: Copy, no_tracing: None) -> None:
    (copy.folder / "checkpoint" / "special_tokens_map.json").write_text('{"bos_token": "<s>"}\n', encoding="utf-8")
    assert _actions(copy.export()) == {"files": "run"}
    assert (copy.bundle / "special_tokens_map.json").read_text(encoding="utf-8") == '{"bos_token": "<s>"}\n'
    assert Bundle.open(copy.bundle).verify() == []


def test_a_damaged_bundle_is_mended(copy: Copy, no_tracing: None) -> None:
    (copy.bundle / "onnx" / "weights.safetensors").write_bytes(b"cut")
    (copy.bundle / "tokenizer.json").unlink()
    assert _actions(copy.export()) == {"weights": "run", "files": "run"}
    assert Bundle.open(copy.bundle).verify() == []


def test_what_a_killed_replacement_left_is_removed(copy: Copy, no_tracing: None) -> None:
    """Killed after the new bundle took its name and before the old one was removed."""
    shutil.copytree(copy.bundle, copy.folder / "bundle.replaced")
    (copy.folder / "bundle.partial").mkdir()
    assert _actions(copy.export()) == {}
    assert sorted(path.name for path in copy.folder.iterdir()) == ["bundle", "checkpoint", "vision_tower"]


def _other_resampling(checkpoint: Path) -> None:
    tower = next((checkpoint.parent / "vision_tower").iterdir())
    (tower / "preprocessor_config.json").write_text('{"resample": 2}', encoding="utf-8")


def _other_channels(checkpoint: Path) -> None:
    tower = next((checkpoint.parent / "vision_tower").iterdir())
    (tower / "preprocessor_config.json").write_text('{"image_mean": [0.5, "0.5", 0.5]}', encoding="utf-8")


@pytest.mark.parametrize(("spoil", "message"), [(_other_resampling, "resample"), (_other_channels, "image_mean")])
def test_what_the_manifest_cannot_say_is_refused_first(copy: Copy, spoil: Callable[[Path], None], message: str) -> None:
    """Not after the minutes that the weights of a large checkpoint take."""
    spoil(copy.folder / "checkpoint")
    shutil.rmtree(copy.bundle)
    before = copy.state()
    with pytest.raises(MoiieError, match=f"preprocessor_config.json: {message}"):
        copy.export()
    assert copy.state() == before
