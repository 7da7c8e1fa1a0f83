"""One ONNX file in a TensorRT dialect -> one engine file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_export.builders.engine_specs import Profile
from moiie_export.builders.library import Library
from moiie_export.builders.parsed_attention import check_lengths
from moiie_runtime.backends.tensorrt_log import Said
from moiie_runtime.backends.tensorrt_log import listener as new_listener
from moiie_runtime.errors import MissingDependency, MoiieError

_log = logging.getLogger(__name__)

_DROPPED = "Unused Input"
"""An input that the parser ignores: the engine would compute something else, without an error."""


@dataclass(frozen=True)
class EngineJob:
    """What to build.

    Attributes:
        name: of the network; two builds of the same graph differ in nothing else.
        graph: the ONNX file, its weights beside it.
        output: the engine file.
        profiles: sizes of open dimensions.
        sms: compute capabilities; those of the GPU here when the library builds for no other.
        plugins: the plugin library; None where the graph has no node for it.
        embed_plugins: whether it is stored in the engine.
        timing_cache: measured kernels of earlier builds, read and written; None: none.
        counted_attention: TRT_Attention nodes that are told how many keys there are.
    """

    name: str
    graph: Path
    output: Path
    profiles: Sequence[Profile]
    sms: tuple[int, ...]
    plugins: Path | None = None
    embed_plugins: bool = True
    timing_cache: Path | None = None
    counted_attention: int = 0


def compile_engine(library: Library, job: EngineJob, progress: Callable[[int, int], None]) -> None:
    """Parse and build.

    Args:
        library: TensorRT.
        job: what to build.
        progress: called with steps done and steps in all.

    Raises:
        MoiieError: the parser or the builder refuses; with what it said.
        KeyboardInterrupt: after the builder has stopped.
    """
    trt = library.trt
    listener = new_listener(trt)
    builder = trt.Builder(listener)
    if library.sms:  # nothing is measured, and threads that race would give the engine other bytes each time
        builder.max_threads = 1
    network, parser = _parse(trt, builder, listener, job)
    check_lengths(network, job.name, job.counted_attention)
    config = builder.create_builder_config()
    _set_targets(config, library, job.sms)
    _require_user_memory(trt, config)
    for profile in _optimization_profiles(builder, network, job):
        config.add_optimization_profile(profile)
    if job.plugins is not None and job.embed_plugins:
        config.plugins_to_serialize = [str(job.plugins)]
    if any(network.get_input(i).name.startswith("past_key_values") for i in range(network.num_inputs)):
        _allow_aliases(trt, config)
    cache = _timing_cache(config, job)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    _write(trt, builder, (network, config), job, listener)
    monitor.reraise()
    _check_dropped(listener.said, job)
    if cache is not None and job.timing_cache is not None:
        job.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    del parser  # holds the weights that the network refers to


def _parse(trt: Any, builder: Any, listener: Any, job: EngineJob) -> tuple[Any, Any]:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    network.name = job.name
    parser = trt.OnnxParser(network, listener)
    said: Said = listener.said
    if not parser.parse_from_file(str(job.graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        said.errors[:0] = [f"{each.desc()} (node {each.node_name() or each.node()})" for each in found]
        said.errors[:0] = _plugin_refusals(job, said.errors)
        raise said.refusal(f"{job.name}: TensorRT cannot parse the graph", _parse_hint(said))
    return network, parser


def _plugin_refusals(job: EngineJob, errors: Sequence[str]) -> list[str]:
    """Why our plugins refused a node, with TensorRT's own first words, which only say that one did and where."""
    if job.plugins is None:
        return []
    from moiie_plugins.refusals import take_refusals

    try:
        found = take_refusals(job.plugins)
    except (OSError, AttributeError):  # another library of plugins
        return []
    where = f" (TensorRT: {' '.join(errors[0].split())[:200]})" if errors else ""
    return [f"{each}{where}" for each in found]


def _check_dropped(said: Said, job: EngineJob) -> None:
    """Graphs have no inputs that nothing reads, so one that is called unused was ignored by the parser."""
    dropped = [warning for warning in said.warnings if _DROPPED in warning]
    if dropped:
        said.errors[:0] = dropped
        raise said.refusal(f"{job.name}: TensorRT would ignore an input of a node", "this is a defect of the builder")


def _parse_hint(said: Said) -> str:
    if any("Plugin not found" in error for error in said.errors):
        return "build the plugin library with `moiie plugins build` and name it with --plugins"
    return "run again with -v for all that TensorRT said; `moiie check` knows what each version takes"


def _set_targets(config: Any, library: Library, sms: tuple[int, ...]) -> None:
    if not library.sms:
        return
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if not config.set_compute_capability(library.sms[sm], index):
            raise MissingDependency(f"{library.name} {library.version} refuses SM {sm}", None)


def _optimization_profiles(builder: Any, network: Any, job: EngineJob) -> list[Any]:
    """One for each named profile; none when all shapes are fixed."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    moving = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    if not moving:
        return []
    profiles = []
    for named in job.profiles:
        profile = builder.create_optimization_profile()
        for tensor in moving:
            profile.set_shape(tensor.name, *_shapes(tensor, network, named, job))
        profiles.append(profile)
    return profiles


def _shapes(tensor: Any, network: Any, profile: Profile, job: EngineJob) -> list[tuple[int, ...]]:
    """Smallest, best and largest shape of an input."""
    sizes = []
    for axis, size in enumerate(tuple(tensor.shape)):
        name = tensor.get_dimension_name(axis) if size == -1 else ""
        if size == -1 and name not in profile.sizes:
            raise MoiieError(
                f"{job.name}: input {tensor.name}: profile {profile.name} has no size for {name or axis}", None
            )
        sizes.append(profile.sizes[name] if size == -1 else (size, size, size))
    return [tuple(size[which] for size in sizes) for which in range(3)]


def _allow_aliases(trt: Any, config: Any) -> None:
    """Our KVCacheUpdate writes into its input; releases that have a switch for that have it off."""
    feature = getattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def _require_user_memory(trt: Any, config: Any) -> None:
    """The runtime gives TensorRT for RTX all its memory; an engine that takes some itself cannot be recorded as a CUDA graph."""
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:
        config.set_flag(flag)


def _timing_cache(config: Any, job: EngineJob) -> Any:
    if job.timing_cache is None:
        return None
    known = job.timing_cache.read_bytes() if job.timing_cache.is_file() else b""
    cache = config.create_timing_cache(known)
    return cache if cache is not None and config.set_timing_cache(cache, True) else None


def _write(trt: Any, builder: Any, made: tuple[Any, Any], job: EngineJob, listener: Any) -> None:
    """Build into the file, in pieces where the library can; no file is left after an error."""
    try:
        _write_file(trt, builder, made, job, listener)
    except BaseException:
        job.output.unlink(missing_ok=True)
        raise


def _write_file(trt: Any, builder: Any, made: tuple[Any, Any], job: EngineJob, listener: Any) -> None:
    network, config = made
    with job.output.open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            done = builder.build_serialized_network_to_stream(network, config, _stream(trt, file))
        else:
            plan = builder.build_serialized_network(network, config)
            done = plan is not None
            if plan is not None:
                file.write(plan)
    if config.progress_monitor is not None:
        config.progress_monitor.reraise()
    hint = "run again with -v for all that TensorRT said; `moiie check` tells what a target supports"
    refusals = _plugin_refusals(job, listener.said.errors)
    listener.said.errors[:0] = refusals
    if not done:
        raise listener.said.refusal(f"{job.name}: TensorRT cannot build the engine", hint)
    if refusals:  # TensorRT asks for some things, such as the size of a workspace, in a way that knows no refusal
        raise listener.said.refusal(f"{job.name}: a plugin refuses the engine, which TensorRT built nevertheless", hint)


def _stream(trt: Any, file: Any) -> Any:
    class Stream(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            return int(file.write(data))

    return Stream()


def _monitor(trt: Any, progress: Callable[[int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phase; an exception stops the builder and is raised behind it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.outer: str | None = None
            self.steps = 1
            self.failure: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                with self.lock:
                    self.outer, self.steps = name, max(1, steps)
                self.report(0)

        def phase_finish(self, name: str) -> None:
            if name == self.outer:
                self.report(self.steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outer:
                self.report(min(step + 1, self.steps))
            return self.failure is None

        def report(self, done: int) -> None:
            try:
                progress(done, self.steps)
            except BaseException as error:  # raised again once the library is left
                self.failure = error

        def reraise(self) -> None:
            if self.failure is not None:
                raise self.failure

    return Monitor()
