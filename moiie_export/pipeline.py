"""Checkpoint to bundle: which stages there are and what each of them writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from moiie_export import __version__
from moiie_export.bundle_files import copy_files, text_files
from moiie_export.bundle_manifest import describe_model
from moiie_export.bundle_readme import README, README_CODE, write_readme
from moiie_export.calibration_stage import CALIBRATION_CODE, calibrate, check_calibration
from moiie_export.completeness import prove
from moiie_export.families import family_of
from moiie_export.graph_stage import GRAPH_CODE, write_graph
from moiie_export.quantize.islands import AUTO, RANGES, find_islands, probe, probe_inputs, with_islands
from moiie_export.quantize.rules import Resolved, resolve
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource
from moiie_export.stages import Progress, Stage, StagePlan, StageRecord, Workspace, fingerprint
from moiie_export.statistics_stage import Statistics
from moiie_export.weights_stage import WEIGHTS_CODE, WEIGHTS_FILE, WeightsJob
from moiie_runtime.cores import available_cores
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import sha256_file

if TYPE_CHECKING:
    from moiie_export.graph_process import Tracer

PARALLEL_BYTES = 1 << 30
"""Fewer bytes of weights are written before another process that traces has started."""
_UNKNOWN = "what stays float32 is not measured yet"

WriteGraph: TypeAlias = "Callable[[str, Path], Mapping[str, Any]]"
"""Writes the graph of this name below a directory, as `write_graph`."""


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
    """What `export_bundle` would do. The checkpoint is opened, checked and hashed; nothing is written and no model run."""
    with _open(request) as source:
        workspace = Workspace.look(request.output)
        probing = _probing(request, source)
        known = None if probing is None or request.force else workspace.notes(probing)
        work = _settled(request, source, probing, known or {})
        plans = workspace.plan(_stages(request, source, work, _tracing_here(source, work)), request.force)
        if probing is not None and known is None and not request.force:
            plans = [each if each.name == RANGES else replace(each, action="run", reason=_UNKNOWN) for each in plans]
        return Plan(plans, WeightsJob.of(source, work.resolved).nbytes, work.described["name"])


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
        workspace = Workspace.look(request.output)
        work = _measured(request, source, workspace, report)
        with _tracer(request, source, work, workspace) as tracer:
            stages = _stages(request, source, work, _tracing(source, work, tracer))
            plans = workspace.plan(stages, request.force)
            finished = None if request.force else workspace.finished(stages)
            if finished is None or not workspace.says(manifest := _manifest(work.described, source, finished)):
                with workspace.locked():
                    plans = workspace.plan(stages, request.force)
                    records = workspace.execute(stages, _watching(tracer, report), request.force)
                    manifest = _manifest(work.described, source, records)
                    workspace.finish(manifest, list(manifest["files"]))
            elif workspace.littered:
                with workspace.locked():
                    workspace.clear()
    return ExportResult(request.output, plans, time.monotonic() - started, manifest["files"])


@dataclass(frozen=True)
class _Work:
    """What becomes of a source.

    Attributes:
        resolved: how each weight is stored.
        statistics: what is measured for that.
        described: the manifest so far.
        probing: the stage that found the islands, if one did.
    """

    resolved: Resolved
    statistics: Statistics
    described: Mapping[str, Any]
    probing: Stage | None

    @property
    def capacity(self) -> int:
        """Tokens of the key-value buffers."""
        return int(self.described["kv_cache"]["capacity"])


def _open(request: ExportRequest) -> ModelSource:
    return ModelSource.open(request.checkpoint, request.vision_tower or request.recipe.model.vision_tower)


def _probing(request: ExportRequest, source: ModelSource) -> Stage | None:
    """The stage that measures what `export.islands: auto` means; None when nothing is to be measured."""
    wanted, cases = request.recipe.export.islands, request.recipe.calibration.cases
    find_islands(wanted, source)
    if AUTO not in wanted:
        return None
    inputs = fingerprint(*probe_inputs(source, cases))
    return Stage(RANGES, inputs, (), lambda _, progress: {"islands": probe(source, cases, progress)})


def _measured(request: ExportRequest, source: ModelSource, workspace: Workspace, progress: Progress) -> _Work:
    """The work, islands measured unless an earlier export did; they decide about every stage that follows."""
    probing = _probing(request, source)
    if probing is None:
        return _settled(request, source, None, {})
    notes = None if request.force else workspace.notes(probing)
    found = probing.run(workspace.partial, progress) if notes is None else notes
    return _settled(request, source, replace(probing, run=lambda *_: found), found)


def _settled(request: ExportRequest, source: ModelSource, probing: Stage | None, measured: Mapping[str, Any]) -> _Work:
    """How each weight is stored; the source's stacks are taken apart where their experts differ."""
    recipe = request.recipe
    islands = find_islands(recipe.export.islands, source, measured.get("islands", ()))
    section = with_islands(recipe.quantization, islands)
    resolved = resolve(section, recipe.export.dtype, source.weight_map, source.config)
    source.weight_map = resolved.weight_map
    statistics = Statistics.plan(recipe, source, resolved, tuple(islands))
    return _Work(resolved, statistics, describe_model(source, recipe, _capacity(request, source)), probing)


def _tracing_here(source: ModelSource, work: _Work) -> WriteGraph:
    return lambda name, directory: write_graph(name, source, work.capacity, directory, work.resolved.schemes)


def _tracing(source: ModelSource, work: _Work, tracer: Tracer | None) -> WriteGraph:
    """What writes a graph: another process where it is at it, else this one."""
    here = _tracing_here(source, work)
    if tracer is None:
        return here
    return lambda name, directory: (tracer.write if name in tracer.names else here)(name, directory)


@contextmanager
def _tracer(request: ExportRequest, source: ModelSource, work: _Work, workspace: Workspace) -> Iterator[Tracer | None]:
    """A process at the graphs that are not done; None where all is done before it would have started."""
    stages = _graph_stages(source, work, _tracing_here(source, work))
    names = tuple(each.name for each in workspace.plan(stages, request.force) if each.action == "run")
    job, cores = WeightsJob.of(source, work.resolved), available_cores()
    if not names or cores < 2 or job.nbytes < PARALLEL_BYTES:
        yield None
        return
    from moiie_export.graph_process import GraphJob, Tracer

    wanted = GraphJob(names, source.config, source.weight_map, work.capacity, work.resolved.schemes, job.specs())
    with Tracer(wanted) as tracer:
        yield tracer


def _watching(tracer: Tracer | None, report: Progress) -> Progress:
    """The report, which also ends the work when tracing failed: a graph that cannot be made needs no weights."""
    if tracer is None:
        return report

    def watch(stage: str, done: int, total: int) -> None:
        tracer.check()
        report(stage, done, total)

    return watch


def _capacity(request: ExportRequest, source: ModelSource) -> int:
    config, wanted = source.config, request.recipe.export.max_context
    if wanted is not None and wanted > config.text.max_position_embeddings:
        raise MoiieError(
            f"export.max_context: {wanted} is more than the model's {config.text.max_position_embeddings} positions",
            f"use --max-context {config.text.max_position_embeddings} or less",
        )
    return wanted or config.max_context


def _stages(request: ExportRequest, source: ModelSource, work: _Work, write: WriteGraph) -> list[Stage]:
    """Weights before graphs, which refer to their offsets."""
    resolved, statistics = work.resolved, work.statistics
    weights = fingerprint(WEIGHTS_CODE, source.hashes, repr(source.config), _stored(work), *statistics.inputs)
    pictures = request.recipe.calibration.images
    check_calibration(work.described, pictures)
    job = replace(WeightsJob.of(source, resolved), fingerprint=weights, resume=not request.force)
    return [
        *([] if work.probing is None else [work.probing]),
        Stage(
            "weights",
            weights,
            (WEIGHTS_FILE,),
            lambda directory, progress: statistics.write(job, directory, progress),
        ),
        *_graph_stages(source, work, write),
        *_calibration(work.described, pictures, fingerprint(weights, _graphs(source, work))),
        _file_stage(source, work),
    ]


def _file_stage(source: ModelSource, work: _Work) -> Stage:
    """The small files, behind the graphs, of which the README tells."""
    texts, names = text_files(source), family_of(source.config).graphs(source.config)

    def write(directory: Path, _: Progress) -> Mapping[str, Any]:
        write_readme(work.described, names, directory)
        return copy_files(texts, directory)

    inputs = fingerprint(texts, README_CODE, work.described["name"], _graphs(source, work))
    return Stage("files", inputs, (*texts, README), write)


def _graph_stages(source: ModelSource, work: _Work, write: WriteGraph) -> list[Stage]:
    def stage(name: str) -> Stage:
        inputs = fingerprint(_graphs(source, work), name)
        return Stage(name, inputs, (f"onnx/{name}.onnx",), lambda directory, _: write(name, directory))

    return [stage(name) for name in family_of(source.config).graphs(source.config)]


def _graphs(source: ModelSource, work: _Work) -> str:
    return fingerprint(GRAPH_CODE, repr(source.config), _stored(work), work.capacity)


def _stored(work: _Work) -> dict[str, str]:
    return {name: repr(form) for name, form in work.resolved.forms.items()}


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
