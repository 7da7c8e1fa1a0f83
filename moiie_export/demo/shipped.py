"""Where the shipped model lies, and its bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from moiie_runtime.errors import MoiieError

BUNDLE = "moiie-demo.bundle"


def shipped_checkpoint() -> Path:
    """The checkpoint directory of the demo model.

    Raises:
        MoiieError: the installation lacks it.
    """
    path = Path(str(files("moiie_recipes"))) / "demo" / "model"
    if not (path / "config.json").is_file():
        raise MoiieError(
            f"{path}: the demo model is not there",
            "install the project again, or train it: python -m moiie_recipes.demo.train --out build/demo-training",
        )
    return path


def export_demo(
    directory: Path, checkpoint: Path | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """Export the demo model into `directory`, or find it there already; returns the bundle.

    Args:
        directory: the work directory.
        checkpoint: another checkpoint of the same kind; default: the shipped one.
        progress: as for `export_bundle`.
    """
    from moiie_export.pipeline import ExportRequest, export_bundle
    from moiie_export.recipe import load_recipe

    request = ExportRequest(checkpoint or shipped_checkpoint(), directory / BUNDLE, load_recipe("demo"))
    return export_bundle(request, progress).path
