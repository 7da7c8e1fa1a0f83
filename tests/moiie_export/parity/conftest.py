"""A small synthetic model, its bundle, and changed copies of both; a window shorter than every prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moiie_export.parity import Report, check_parity
from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_export.stages import file_record
from tests.exports import Exported, exported
from tests.moiie_export.conftest import edit_json, rewrite
from tests.tracing import traced_once

WINDOW = 20
SETTINGS: Mapping[str, Any] = {"layers": 4, "dtype": "F32", "sliding_window": WINDOW}
CONTEXT = 256

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """The model that all mutants are compared with."""

    base: Exported
    folder: Path

    def with_tensors(self, change: Callable[[Tensors], Mapping[str, np.ndarray]]) -> Path:
        """A bundle of the same graphs exported from a checkpoint with other tensors."""
        checkpoint = self.copy_checkpoint()
        rewrite(checkpoint, change)
        bundle = self.copy_bundle()
        export_bundle(ExportRequest(checkpoint, bundle, self.base.recipe))
        return bundle

    def with_config(self, **changes: Any) -> Path:
        """A bundle exported from a checkpoint with another config.json; kept beside the base, since it takes tracing."""
        name = "-".join(f"{key}={value}" for key, value in sorted(changes.items()))
        bundle = self.base.bundle.parent / f"with-{name}"
        if not bundle.is_dir():
            checkpoint = self.copy_checkpoint()
            edit_json(checkpoint / "config.json", changes)
            with traced_once():
                export_bundle(ExportRequest(checkpoint, bundle, self.base.recipe))
        return bundle

    def with_graph(self, component: str, change: Callable[[onnx.ModelProto], None]) -> Path:
        """A bundle whose graph was changed and whose manifest was made to fit."""
        bundle = self.copy_bundle()
        change_graph(bundle, component, change)
        return bundle

    def copy_checkpoint(self, to: str = "changed") -> Path:
        """A copy of the checkpoint with its tower beside it, in a folder of its own."""
        source = self.base.checkpoint
        shutil.copytree(source.parent / "vision_tower", self.folder / to / "vision_tower")
        return Path(shutil.copytree(source, self.folder / to / source.name))

    def copy_bundle(self) -> Path:
        """A copy of the bundle."""
        return Path(shutil.copytree(self.base.bundle, self.folder / "bundle"))

    def parity(self, bundle: Path | None = None) -> Report:
        """The report of a bundle, by default its own, against the unchanged checkpoint."""
        return check_parity(bundle or self.base.bundle, self.base.checkpoint)


def change_graph(bundle: Path, component: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph of a bundle in place, and its manifest to fit."""
    path = bundle / "onnx" / f"{component}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    onnx.save(model, str(path))
    sign(bundle, f"onnx/{component}.onnx")


def sign(bundle: Path, name: str) -> None:
    """Write a changed file's size and sha256 into the manifest."""
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: file_record(bundle / name)}))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change bundle.json."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """The synthetic model, with room for changed copies."""
    return Model(exported(SETTINGS, max_context=CONTEXT), tmp_path)
