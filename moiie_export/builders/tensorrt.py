"""The builder of TensorRT and TensorRT for RTX engines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_export.builders import BuildPlan, BuildRequest, BuildResult
from moiie_export.builders.bank_file import FILE as BANKS_FILE
from moiie_export.builders.bank_file import describe_banks, write_banks
from moiie_export.builders.command_lines import command_lines
from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.device import device_sm
from moiie_export.builders.dialect_graph import lower_component, save_graph
from moiie_export.builders.engine_process import run_job
from moiie_export.builders.engine_specs import EngineSpec, engine_specs
from moiie_export.builders.floors import cuda_floor
from moiie_export.builders.library import Library, installed_version, load_library
from moiie_export.builders.output import describe, finished, reuse, write_output
from moiie_export.builders.plan_file import read_header
from moiie_export.builders.plugin_kernels import library_kernels
from moiie_export.builders.requirements import check_formats, check_sms, plugin_library
from moiie_export.disk import copy_file
from moiie_export.stages import Progress
from moiie_export.targets import DIALECT_SMS, Target
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.sizes import readable
from moiie_runtime.strict_files import sha256_file

if TYPE_CHECKING:
    from moiie_export.graph.trt_context import TrtContext

BUILDER_CODE = 4
"""Raised whenever the same bundle and target would give another result."""
PLUGINS_FILE = "libmoiie_plugins.so"
TIMING_CACHE = "timing.cache"
_WORK, _GRAPHS = "work", "graphs"

_BASE = 700 * 2**20
"""Memory of Python, onnx and TensorRT before the first weight."""
_STREAMED, _HELD = 2.3, 3.5
"""Memory for each byte of constants, measured with 1.7.1: written in pieces, and held until the end."""


def build_engines(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build every engine of a target.

    Raises:
        MissingDependency: TensorRT, a GPU that it needs, the plugin library or memory is missing, or an SM is one that
            this TensorRT does not build for.
        MoiieError: TensorRT refuses a graph.
    """
    bundle = Bundle.open(request.bundle)
    bundle.check_files()
    request = _with_plugins(request)
    check_sms(request.target)
    library = load_library(request.target.backend)
    request = replace(request, target=replace(request.target, sms=supported_sms(library, request.target)))
    check_formats(bundle, request.target)
    specs = engine_specs(bundle, request.target)
    _check_memory(request, specs)
    plugins = plugin_library(request, bundle)
    head = _head(request, bundle, library.version, plugins)
    done = reuse(request, head)
    if done is not None:
        return done
    work = _Build(request, bundle, library, plugins, progress)
    return write_output(request, head, _disk(specs), lambda directory: work.fill(directory, specs))


def plan_engines(request: BuildRequest) -> BuildPlan:
    """What `build_engines` would do; TensorRT itself is not loaded."""
    bundle = Bundle.open(request.bundle)
    request = _with_plugins(request)
    check_sms(request.target)
    # Full TensorRT builds for the GPU that it finds on the device, which is not known here.
    check_formats(bundle, replace(request.target, sms=()) if request.target.expected else request.target)
    specs = engine_specs(bundle, request.target)
    version = installed_version(request.target.backend)
    plugins, notes = None, [] if version else [f"{request.target.backend} is not installed here"]
    try:
        plugins = plugin_library(request, bundle)
    except MissingDependency as error:
        if request.plugin_library is not None:
            raise
        notes.append(f"{error.message}: {error.hint}")
    head = _head(request, bundle, version or "", plugins)
    for spec in specs:
        sizes = f"{readable(spec.constants)} of constants, {readable(spec.banks)} of experts as inputs"
        notes.append(f"{spec.component}: profiles {', '.join(each.name for each in spec.profiles)}; {sizes}")
    return BuildPlan(
        cached=not request.force and finished(request, head) is not None,
        peak_bytes=_peak(request.target, specs),
        disk_bytes=_disk(specs),
        commands=tuple(command_lines(bundle, request.target, specs)),
        notes=tuple(notes),
    )


def supported_sms(library: Library, target: Target) -> tuple[int, ...]:
    """The compute capabilities that engines will be built for.

    Raises:
        MissingDependency: one of the target's is not supported, or full TensorRT finds no GPU of the target here.
    """
    if library.sms:
        check_sms(target, f"{library.name} {library.version}", library.sms)
        return target.sms
    here = device_sm()
    if here is None or here not in target.sms:
        found = "there is no GPU here" if here is None else f"the GPU here has SM {here}"
        wanted = ", ".join(str(sm) for sm in target.sms)
        raise MissingDependency(
            f"target {target.name}: TensorRT builds for the GPU of the machine it runs on; {found}, the target wants SM {wanted}",
            "copy the bundle to the device and build it there; of several GPUs CUDA_VISIBLE_DEVICES names the one",
        )
    return (here,)


@dataclass
class _Build:
    """One build, filling a directory."""

    request: BuildRequest
    bundle: Bundle
    library: Library
    plugins: Path | None
    progress: Progress
    with_plugins: set[str] = field(default_factory=set)
    """Components whose graphs have nodes that the plugin library computes."""

    def fill(self, directory: Path, specs: list[EngineSpec]) -> Mapping[str, Any]:
        """Write engines, banks and what belongs to them; returns the rest of engine.json."""
        target = self.request.target
        components, contexts = {}, []
        for spec in specs:
            context, graph = self._graph(spec, directory)
            components[spec.component] = self._engine(spec, context, graph, directory)
            contexts.append(context)
        self._banks(directory, contexts)
        if self.plugins is not None and self.with_plugins and not target.embed_plugins:
            copy_file(self.plugins, directory / PLUGINS_FILE)
        for folder in (_WORK,) if self.request.keep_graphs else (_WORK, _GRAPHS):
            shutil.rmtree(directory / folder, ignore_errors=True)
        return {
            "components": components,
            "residency": {},
            "weights_file": BANKS_FILE,
            "kv_cache": {"dtype": target.precision, "in_place": all(self._in_place(each) for each in contexts)},
            "threads": None,
            "prepack": False,
            "prefill_chunk": min(max(target.prefill), self.bundle.kv_cache.capacity),
            "needs": {self.library.name: self.library.version},
            "sms": list(target.sms),
            "library_sms": _library_sms(self.library, target),
            "floor": cuda_floor(self.library.name),
            "banks": _unique_banks(contexts),
            "plugins": self._plugins(),
        }

    def _graph(self, spec: EngineSpec, directory: Path) -> tuple[TrtContext, Path]:
        """The component's graph in the target's dialect, with its weights beside it."""
        self.progress(f"{spec.component}: graph", 0, 1)
        model, context = lower_component(self.bundle, spec.component, self.request.target)
        if any("plugin_namespace" in node.attributes for node in model.graph) and self.plugins is not None:
            self.with_plugins.add(spec.component)
        path = save_graph(model, spec.component, directory / _GRAPHS)
        context.inputs = {str(v.name): _tensor(v) for v in model.graph.inputs}
        context.outputs = {str(v.name): _tensor(v) for v in model.graph.outputs}
        return context, path

    def _engine(self, spec: EngineSpec, context: TrtContext, graph: Path, directory: Path) -> dict[str, Any]:
        target, stage = self.request.target, f"{spec.component}: engine"
        job = EngineJob(
            name=spec.component,
            graph=graph,
            output=directory / spec.file,
            profiles=spec.profiles,
            sms=target.sms,
            plugins=self.plugins if spec.component in self.with_plugins else None,
            embed_plugins=target.embed_plugins,
            timing_cache=self._timing_cache(directory),
            counted_attention=context.counted_attention,
        )
        run_job(self.library.name, job, lambda done, total: self.progress(stage, done, total))
        if not self.request.keep_graphs:
            shutil.rmtree(directory / _GRAPHS)
        if self.library.name == "tensorrt_rtx":
            _check_header(job.output, self.library, target)
        return {
            "file": spec.file,
            "inputs": list(context.inputs.values()),
            "outputs": list(context.outputs.values()),
            "profiles": [{"name": each.name, "sizes": dict(each.sizes)} for each in spec.profiles],
            "attention": context.attention,
            "aliases": context.aliases,
            "plugins": spec.component in self.with_plugins,
        }

    def _timing_cache(self, directory: Path) -> Path | None:
        """In the new result, begun with that of the result it replaces. Engines for RTX measure nothing while they are built."""
        if self.library.name == "tensorrt_rtx":
            return None
        path, older = directory / TIMING_CACHE, self.request.output / TIMING_CACHE
        if older.is_file() and not path.exists():
            copy_file(older, path)
        return path

    def _banks(self, directory: Path, contexts: list[TrtContext]) -> None:
        inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        parts = {}
        for context in contexts:
            for bank in context.banks:
                for name, tensors in bank.tensors.items():
                    described = context.inputs[name]
                    inputs[name] = (_ONNX_NAMES[described["dtype"]], tuple(described["shape"]))
                    parts[name] = tensors
        self.progress("experts", 0, 1)
        write_banks(directory / BANKS_FILE, inputs, parts)

    def _plugins(self) -> dict[str, Any] | None:
        """What the runtime must know of the library; None where no graph has a node for it.

        The digest of one that is stored in the engines is compared with nothing: theirs, in `files`, cover its bytes.
        """
        if self.plugins is None or not self.with_plugins:
            return None
        embedded, kernels = self.request.target.embed_plugins, library_kernels(self.plugins)
        return {
            "sha256": _digest(self.plugins),
            "file": None if embedded else PLUGINS_FILE,
            "embedded": embedded,
            "kernels": None if kernels is None else asdict(kernels),
        }

    @staticmethod
    def _in_place(context: TrtContext) -> bool:
        outputs = [name for name in context.outputs if name.startswith("present.")]
        return all(name in context.aliases for name in outputs)


_ONNX_NAMES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT", "int8": "INT8"}
_ONNX_NAMES["float8_e4m3fn"] = "FLOAT8E4M3FN"
_NAMES = {
    **{value: key for key, value in _ONNX_NAMES.items()},
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def _tensor(value: Any) -> dict[str, Any]:
    """Name, type and shape of a graph's input or output, as manifests say it."""
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"name": value.name, "dtype": _NAMES[value.dtype.name], "shape": shape}


def _unique_banks(contexts: list[TrtContext]) -> list[dict[str, Any]]:
    """Every bank once, with the components that bind it."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for context in contexts:
        for bank in describe_banks(context.banks):
            entry = found.setdefault(tuple(bank["inputs"]), {**bank, "components": []})
            entry["components"].append(context.component)
    return [found[key] for key in sorted(found)]


def _library_sms(library: Library, target: Target) -> list[int]:
    """The GPUs that this target could be built for, for whoever has another one."""
    known = DIALECT_SMS[target.dialect]
    return sorted(known.intersection(library.sms) if library.sms else known)


def _check_header(path: Path, library: Library, target: Target) -> None:
    """The engine says of itself what was asked for."""
    header = read_header(path)
    version = ".".join(str(number) for number in header.version)
    if version != library.version or set(header.sms) != set(target.sms):
        raise MoiieError(
            f"{path.name}: built as version {version} for SM {list(header.sms)}, "
            f"expected {library.version} for SM {list(target.sms)}",
            "the format of engines has changed: use the pinned version of tensorrt-rtx",
        )


def _with_plugins(request: BuildRequest) -> BuildRequest:
    """A library that is given is used: what is optional becomes part of the engine."""
    if request.plugin_library is None or request.target.plugins != "optional":
        return request
    return replace(request, target=replace(request.target, plugins="required"))


def _head(request: BuildRequest, bundle: Bundle, version: str, plugins: Path | None) -> dict[str, Any]:
    kernels = None if plugins is None else library_kernels(plugins)
    described = None if kernels is None else asdict(kernels)
    code = [BUILDER_CODE, _digest(plugins), described, request.keep_graphs]
    return describe(request, bundle, (request.target.backend, version), code)


def _digest(path: Path | None) -> str | None:
    return None if path is None else sha256_file(path)


def _peak(target: Target, specs: list[EngineSpec]) -> int:
    factor = _STREAMED if target.backend == "tensorrt_rtx" else _HELD
    return int(_BASE + factor * max(spec.constants for spec in specs))


def _disk(specs: list[EngineSpec]) -> int:
    """Engines, banks once, and the largest graph beside its engine."""
    largest = max(spec.constants for spec in specs)
    engines = sum(spec.constants + 16 * 2**20 for spec in specs)
    return engines + largest + max(spec.banks for spec in specs)


def _check_memory(request: BuildRequest, specs: list[EngineSpec]) -> None:
    peak = _peak(request.target, specs)
    if request.memory_limit is not None and peak > request.memory_limit:
        raise MissingDependency(
            f"target {request.target.name}: building is predicted to take {readable(peak)} of memory, "
            f"{readable(request.memory_limit)} may be used",
            "free some memory, or raise --memory-limit; banks: inputs and quantised weights make engines smaller",
        )
