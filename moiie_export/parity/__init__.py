"""Parity: is a bundle the model of its checkpoint? Judged in this order: names, shapes, dtypes, finite, routing, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moiie_export.parity.report import Check, Report
from moiie_export.recipe_parity import ParityCase
from moiie_runtime.errors import MissingDependency

__all__ = ["Check", "ParityCase", "Report", "check_parity"]


def check_parity(  # noqa: PLR0913 - settings, each given by its name
    bundle: Path,
    checkpoint: Path,
    *,
    vision_tower: Path | None = None,
    cases: Sequence[ParityCase] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    target: str | None = None,
    gpu: int | None = None,
) -> Report:
    """Compare a bundle, run by ONNX Runtime, with the PyTorch model of a checkpoint, stage by stage and layer by layer.

    Both sides are teacher-forced: every stage is fed what the checkpoint's model gives it, so that a fault shows where
    it is made and nowhere before. Bounds are those of the recipe stored in the bundle, for the bundle's storage type.
    The bundle's graphs are marked in memory; nothing is written.

    Args:
        bundle: the exported directory.
        checkpoint: the checkpoint it should equal, opened as `moiie export` opens it.
        vision_tower: where a separate vision tower lies, as for export.
        cases: prompts and pictures; None for those of the bundle's recipe, and made-up ones where there are none.
        progress: called with a stage's name, steps done and steps in all.
        target: a form that `moiie build` made of the bundle, in place of its own graphs. What it does not give as an
            output is listed as not run. Bounds are those of engines that round (`parity.bounds.engine_half`,
            `engine_int8`) where it does.
        gpu: which GPU runs a form that was built for one; None: the first.

    Returns:
        The report; truthy when all checks pass.

    Raises:
        MoiieError: no bundle or no checkpoint there, or one that cannot be opened; a picture that cannot be read.
        MissingDependency: torch, onnx or onnxruntime is not installed, or the form cannot run on this machine.
    """
    try:
        from moiie_export.parity.run import Parity
    except ModuleNotFoundError as error:
        raise MissingDependency(f"parity needs {error.name}", "pip install 'moiie-export[cpu,export]'") from error
    return Parity(bundle, checkpoint, vision_tower, target, gpu).run(cases, progress or (lambda *_: None))
