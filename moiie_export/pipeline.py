"""Checkpoint to bundle: which stages there are and what each of them writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moiie_export import __version__
from moiie_export.bundle_files import copy_files, text_files
from moiie_export.bundle_manifest import describe_model
from moiie_export.calibration_stage import CALIBRATION_CODE, calibrate, check_calibration
from moiie_export.completeness import prove
from moiie_export.families import family_of
from moiie_export.graph_stage import GRAPH_CODE, write_graph
from moiie_export.quantize.islands import find_islands, with_islands
from moiie_export.quantize.rules import Resolved, resolve
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource
from moiie_export.stages import Progress, Stage, StagePlan, StageRecord, Workspace, fingerprint
from moiie_export.statistics_stage import Statistics
from moiie_export.weights_stage import WEIGHTS_CODE, WEIGHTS_FILE, WeightsJob
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import sha256_file


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to."""

    checkpoint: Path
    output: Path
    recipe: Recipe
    vision_tower: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Plan:
    """What an export would do: its stages, and the bytes of weights it would write."""

    stages: list[StagePlan]
    bytes: int
    name: str


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle: where, what was done, and its files with sha256 and size."""

    path: Path
    stages: list[StagePlan]
    seconds: float
    files: Mapping[str, Mapping[str, Any]]


def plan(request: ExportRequest) -> Plan:
    """What `export_bundle` would do. The checkpoint is opened, checked and hashed; nothing is written."""
    with _open(request) as source:
        resolved, statistics = _resolve(request, source)
        described = describe_model(source, request.recipe, _capacity(request, source))
        stages = _stages(request, source, (resolved, statistics), described)
        plans = Workspace.look(request.output).plan(stages, request.force)
        return Plan(plans, WeightsJob.of(source, resolved).nbytes, described["name"])


def export_bundle(request: ExportRequest, progress: Progress | None = None) -> ExportResult:
    """Export a checkpoint to a bundle, reusing what an earlier, interrupted or finished export left.

    Returns:
        The finished bundle. The output path does not exist before it is complete.

    Raises:
        MoiieError: anything in checkpoint, tower or recipe that is wrong or not implemented, by name.
    """
    started = time.monotonic()
    report = progress or (lambda *_: None)
    with _open(request) as source:
        resolved, statistics = _resolve(request, source, report)
        described = describe_model(source, request.recipe, _capacity(request, source))
        stages = _stages(request, source, (resolved, statistics), described)
        workspace = Workspace.look(request.output)
        plans = workspace.plan(stages, request.force)
        finished = None if request.force else workspace.finished(stages)
        if finished is None or not workspace.says(manifest := _manifest(described, source, finished)):
            with workspace.locked():
                plans = workspace.plan(stages, request.force)
                records = workspace.execute(stages, report, request.force)
                manifest = _manifest(described, source, records)
                workspace.finish(manifest, list(manifest["files"]))
        elif workspace.littered:
            with workspace.locked():
                workspace.clear()
    return ExportResult(request.output, plans, time.monotonic() - started, manifest["files"])


def _open(request: ExportRequest) -> ModelSource:
    return ModelSource.open(request.checkpoint, request.vision_tower or request.recipe.model.vision_tower)


def _resolve(
    request: ExportRequest, source: ModelSource, progress: Progress | None = None
) -> tuple[Resolved, Statistics]:
    """How each weight is stored; the source's stacks are taken apart where their experts differ."""
    recipe = request.recipe
    islands = find_islands(recipe.export.islands, source, recipe.calibration.cases, progress)
    section = with_islands(recipe.quantization, islands)
    resolved = resolve(section, recipe.export.dtype, source.weight_map, source.config)
    source.weight_map = resolved.weight_map
    return resolved, Statistics.plan(recipe, source, resolved, tuple(islands))


def _capacity(request: ExportRequest, source: ModelSource) -> int:
    config, wanted = source.config, request.recipe.export.max_context
    if wanted is not None and wanted > config.text.max_position_embeddings:
        raise MoiieError(
            f"export.max_context: {wanted} is more than the model's {config.text.max_position_embeddings} positions",
            f"use --max-context {config.text.max_position_embeddings} or less",
        )
    return wanted or config.max_context


def _stages(
    request: ExportRequest, source: ModelSource, storage: tuple[Resolved, Statistics], described: Mapping[str, Any]
) -> list[Stage]:
    """Weights first: the graphs refer to their offsets."""
    resolved, statistics = storage
    capacity = described["kv_cache"]["capacity"]
    stored = {name: repr(form) for name, form in resolved.forms.items()}
    weights = fingerprint(WEIGHTS_CODE, source.hashes, repr(source.config), stored, *statistics.inputs)
    graphs = fingerprint(GRAPH_CODE, repr(source.config), stored, capacity)
    texts = text_files(source)
    pictures = request.recipe.calibration.images
    check_calibration(described, pictures)
    job = replace(WeightsJob.of(source, resolved), fingerprint=weights, resume=not request.force)

    def graph_stage(name: str) -> Callable[[Path, Progress], Mapping[str, Any]]:
        return lambda directory, _: write_graph(name, source, capacity, directory, resolved.schemes)

    return [
        Stage(
            "weights",
            weights,
            (WEIGHTS_FILE,),
            lambda directory, progress: statistics.write(job, directory, progress),
        ),
        *(
            Stage(name, fingerprint(graphs, name), (f"onnx/{name}.onnx",), graph_stage(name))
            for name in family_of(source.config).graphs(source.config)
        ),
        *_calibration(described, pictures, fingerprint(weights, graphs)),
        Stage("files", fingerprint(texts), tuple(texts), lambda directory, _: copy_files(texts, directory)),
    ]


def _calibration(described: Mapping[str, Any], pictures: Sequence[Path], before: str) -> list[Stage]:
    if not pictures:
        return []
    inputs = [sha256_file(path) for path in pictures]
    return [
        Stage(
            "calibration",
            fingerprint(CALIBRATION_CODE, before, inputs),
            (),
            lambda directory, progress: calibrate(described, pictures, directory, progress),
        )
    ]


def _calibrated(described: Mapping[str, Any], records: Mapping[str, StageRecord]) -> dict[str, Any]:
    """The description with what was measured written beside the vision experts."""
    if "calibration" not in records:
        return dict(described)
    sizes = records["calibration"].notes["mean_abs_feature"]
    experts = [{**expert, "mean_abs_feature": sizes[expert["name"]]} for expert in described["vision_experts"]]
    return {**described, "vision_experts": experts}


def _files(records: Mapping[str, StageRecord]) -> dict[str, Any]:
    return {name: entry for record in records.values() for name, entry in record.files.items()}


def _manifest(described: Mapping[str, Any], source: ModelSource, records: Mapping[str, StageRecord]) -> dict[str, Any]:
    graphs = {name: record.notes for name, record in records.items() if "inputs" in record.notes}
    parameters = source.weight_map.by_parameter()
    used = {name: [each for each in notes["weights"] if each in parameters] for name, notes in graphs.items()}
    phases = {name: name.removeprefix("decoder_") for name in graphs}
    residency = {
        phases[name]: {"weights": notes["weights"], "bytes": notes["weight_bytes"]} for name, notes in graphs.items()
    }
    return {
        **_calibrated(described, records),
        "created_by": {"tool": "moiie-export", "version": __version__},
        "source": {"checkpoint": source.checkpoint.path.resolve().name, "files": source.hashes},
        "components": {
            name: {
                "file": f"onnx/{name}.onnx",
                **{key: notes[key] for key in ("inputs", "outputs", "op_counts", "weights")},
            }
            for name, notes in graphs.items()
        },
        "residency": residency,
        **records["weights"].notes,
        "completeness": prove(source.config, source.weight_map, used),
        "files": _files(records),
        "stages": {name: vars(record) for name, record in records.items()},
    }
