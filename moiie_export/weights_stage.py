"""Stage `weights`: every weight once, in one safetensors file, streamed in blocks of rows on all cores.

A killed export continues within the stage: see weights_file.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from moiie_export.quantize.folding import Folding, plan_folds
from moiie_export.quantize.packing import stored_specs
from moiie_export.quantize.rules import Form, Resolved
from moiie_export.source import ModelSource
from moiie_export.stages import Progress
from moiie_export.weights_file import WeightsFile
from moiie_export.weights_run import Run, StatisticsProvider, Step
from moiie_export.weights_units import BLOCK, CALIBRATED_BLOCK, units_of
from moiie_runtime.tensor_header import ITEM_SIZES

WEIGHTS_FILE = "onnx/weights.safetensors"
WEIGHTS_CODE = 2
"""Raised whenever this stage would write other bytes for the same checkpoint and storage."""

_WIDE_FIRST = ("F32", "F16")


@dataclass(frozen=True)
class WeightsJob:
    """What to write.

    Attributes:
        source: the checkpoint.
        forms: weight -> how it is stored.
        fingerprint: what an interrupted file must have been begun with to be continued.
        resume: whether it may be continued at all.
        statistics: for the methods that need them.
        folding: where factors of AWQ go.
    """

    source: ModelSource
    forms: Mapping[str, Form]
    fingerprint: str = ""
    resume: bool = True
    statistics: StatisticsProvider | None = None
    folding: Folding = field(default_factory=Folding)

    @classmethod
    def of(cls, source: ModelSource, resolved: Resolved) -> WeightsJob:
        """What the recipe's rules make of a source, whose weight map is the resolved one."""
        return cls(source, resolved.forms, folding=plan_folds(resolved))

    @classmethod
    def plain(cls, source: ModelSource, dtype: str) -> WeightsJob:
        """Everything in `dtype`, but for what stays float32 anyway."""
        weights = source.weight_map.weights
        return cls(source, {weight.name: Form("float32" if weight.keep_float32 else dtype) for weight in weights})

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) in file order; wide types first, so that every tensor is aligned to its item size."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            fold.tensor: ("F32", (fold.width,)) for fold in self.folding.folds
        }
        for weight in self.source.weight_map.weights:
            form = self.forms[weight.name]
            if form.scheme is None:
                found[weight.name] = ("F32" if form.format == "float32" else "F16", weight.shape)
            else:
                beside = stored_specs(weight.shape, form.scheme)
                found |= {weight.name + suffix: spec for suffix, spec in beside.items()}
        order = {dtype: position for position, dtype in enumerate(_WIDE_FIRST)}
        return dict(sorted(found.items(), key=lambda item: order.get(item[1][0], len(order))))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ITEM_SIZES[kind] * prod(shape) for kind, shape in self.specs().values())


def write_weights(job: WeightsJob, path: Path, progress: Progress) -> Mapping[str, Any]:
    """Stream all weights into `path`; memory stays at some blocks per core, whatever the checkpoint's size.

    Returns:
        Notes for the manifest: the section `quantization` when something is quantised, else nothing.

    Raises:
        MoiieError: NaN or infinity in the checkpoint, a number that its storage cannot hold, or a full disk; what was
            written up to the last commit is kept for the next run.
    """
    units = [
        unit
        for weight in job.source.weight_map.weights
        for unit in units_of(weight, CALIBRATED_BLOCK if job.forms[weight.name].calibrated else BLOCK)
    ]
    steps: list[Step] = [*job.folding.folds, *units]
    with WeightsFile(path, job.specs(), job.fingerprint, len(steps), resume=job.resume) as file:
        if not file.complete:
            Run(job, file, steps, progress).run()
            file.finish()
        return _notes(job, file.notes)


def _notes(job: WeightsJob, fallbacks: Mapping[str, str]) -> dict[str, Any]:
    entries: dict[str, dict[str, Any]] = {}
    for name, form in job.forms.items():
        if form.scheme is not None:
            entries[name] = {"format": form.format, "method": form.method}
            entries[name] |= {"group_size": form.scheme.group_size} if form.scheme.grouped else {}
    if not entries:
        return {}
    found: dict[str, Any] = {"weights": entries}
    if fallbacks:
        found["fallbacks"] = dict(sorted(fallbacks.items()))
    if job.folding.folds:
        found["scales"] = job.folding.describe()
    return {"quantization": found}
