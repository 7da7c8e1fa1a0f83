"""Golden checkpoints that a test may change: a copy of one case, with its config, tower and tensors at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
REMOVED: Any = object()


@dataclass(frozen=True)
class CaseCopy:
    """A copy of one golden case in a directory of its own."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint directory."""
        return self.path / "checkpoint"

    @property
    def tower(self) -> Path:
        """The separate vision tower."""
        return next((self.path / "vision_tower").iterdir())

    def config(self, **changes: Any) -> None:
        """Write keys of config.json; REMOVED takes one away."""
        edit_json(self.checkpoint / "config.json", changes)

    def tensors(self, change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
        """Replace the checkpoint's tensors by what `change` makes of them, in one file."""
        rewrite(self.checkpoint, change)

    def tower_tensors(self, change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
        """The same for the tower."""
        rewrite(self.tower, change)


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Write keys of a JSON file; a value REMOVED takes the key away."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    document |= changes
    kept = {key: value for key, value in document.items() if value is not REMOVED}
    path.write_text(json.dumps(kept), encoding="utf-8")


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
    """Rewrite a directory's safetensors as one model.safetensors."""
    files = sorted(directory.glob("*.safetensors"))
    held = {name: value for file in files for name, value in load_file(file).items()}
    for file in (*files, *directory.glob("*.index.json")):
        file.unlink()
    save_file(
        {name: np.ascontiguousarray(value) for name, value in change(held).items()}, directory / "model.safetensors"
    )


@pytest.fixture
def golden_copy(tmp_path: Path) -> Callable[..., CaseCopy]:
    """golden_copy("moiie_phi3") -> a copy that the test may change."""

    def copy(name: str, to: str = "case") -> CaseCopy:
        target = tmp_path / to
        for part in ("checkpoint", "vision_tower"):
            shutil.copytree(GOLDEN / name / part, target / part)
        return CaseCopy(target)

    return copy


@pytest.fixture
def removed() -> Any:
    """Value for `CaseCopy.config` that takes a key away."""
    return REMOVED
