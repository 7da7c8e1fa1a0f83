"""Where the shipped models lie, and their bundles."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from moiie_export.demo.family import DemoFamily
from moiie_runtime.errors import MoiieError


def shipped_checkpoint(family: DemoFamily) -> Path:
    """The checkpoint directory of a family's demo model.

    Raises:
        MoiieError: the installation lacks it.
    """
    path = Path(str(files("moiie_recipes"))).joinpath(*family.folder.split("/"))
    if not (path / "config.json").is_file():
        raise MoiieError(
            f"{path}: the demo model is not there",
            f"install the project again, or train it: python -m {family.training} --out build/demo-training",
        )
    return path


def export_demo(
    family: DemoFamily,
    directory: Path,
    checkpoint: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Export a demo model into `directory`, or find it there already; returns the bundle.

    Args:
        family: the demo.
        directory: the work directory.
        checkpoint: another checkpoint of the same kind; default: the shipped one.
        progress: as for `export_bundle`.
    """
    from moiie_export.pipeline import ExportRequest, export_bundle
    from moiie_export.recipe import load_recipe

    bundle = directory / f"{family.name}-demo.bundle"
    request = ExportRequest(checkpoint or shipped_checkpoint(family), bundle, load_recipe(family.recipe))
    return export_bundle(request, progress).path
