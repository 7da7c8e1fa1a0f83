"""Values inside TensorRT engines: the graph that went into an engine is built again with them as outputs, and run once.

Needs the GPU of the target. The graph is the one that `moiie build --keep-graphs` left beside the engine, or made again
from the bundle, which gives the same one. An engine with more outputs is not quite the engine: TensorRT fuses less.
Tested with an emulated TensorRT, not run on a GPU so far.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.dialect_graph import lower_component, save_graph, target_of
from moiie_export.builders.engine_process import run_job
from moiie_export.builders.engine_specs import Profile
from moiie_export.parity.bisect_plugins import holds_plugins, plugin_library
from moiie_export.parity.values import caches_of
from moiie_runtime.backends.session import EngineOptions, Session, TensorSpec
from moiie_runtime.backends.tensorrt import TensorRtSession
from moiie_runtime.backends.tensorrt_io import tensor_specs
from moiie_runtime.backends.tensorrt_library import load_library
from moiie_runtime.backends.tensorrt_shared import TensorRtShared
from moiie_runtime.engines import Engine
from moiie_runtime.errors import MoiieError
from moiie_runtime.manifest import FileRecord
from moiie_runtime.strict_files import sha256_file


class TensorRtValues:
    """Runs marked graphs of a TensorRT engine. See `Values` in bisect_sides.py.

    Args:
        engine: the built form.
        options: of its backend, which found TensorRT and a GPU.
        plugins: where the plugin library lies that the engines hold.

    Raises:
        MissingDependency: the library is not there.
    """

    def __init__(self, engine: Engine, options: EngineOptions, plugins: Path | None = None) -> None:
        assert options.device is not None
        self._plugins = plugin_library(engine, plugins)
        self._engine, self._device = engine, options.device
        self._library = load_library(engine.backend)
        self._work = tempfile.TemporaryDirectory()
        self._folder = Path(self._work.name)
        self.caches = caches_of(engine.bundle, options.device)

    def graph(self, component: str) -> onnx.ModelProto:
        """The graph that went into the engine, without its weights.

        Raises:
            MoiieError: it was not kept, and this version makes another one.
        """
        for path in self._folder.iterdir():  # of the component before
            path.unlink()
        kept = self._engine.bundle.path(f"{self._engine.folder}/graphs")
        if (kept / f"{component}.onnx").is_file():
            for path in kept.glob(f"{component}.*"):
                shutil.copyfile(path, self._folder / path.name)
        else:
            save_graph(self._lowered(component), component, self._folder)
        return onnx.load(str(self._folder / f"{component}.onnx"), load_external_data=False)

    @contextmanager
    def open(self, component: str, model: onnx.ModelProto, names: list[str]) -> Iterator[Session]:
        """Build with these values as outputs; see `Values`."""
        graph = self._folder / "marked.onnx"  # its weights are named relative to it
        onnx.save(mark(model, names), str(graph))
        plan = graph.with_suffix(".engine")
        run_job(self._engine.backend, self._job(component, graph, plan), lambda *_: None)
        shared = TensorRtShared(self._engine, self._library, self._device)
        try:
            shared.engine = self._marked(component, plan, tensor_specs(shared.deserialize(plan)))
            options = EngineOptions(device=self._device, shared=shared)
            with TensorRtSession(plan, component=component, transient=True, options=options) as session:
                yield session
        finally:
            shared.close()

    def close(self) -> None:
        """Remove the graphs."""
        self._work.cleanup()

    def _lowered(self, component: str) -> ir.Model:
        """The graph as the builder makes it."""
        model, _ = lower_component(self._engine.portable, component, target_of(self._engine.document))
        built = {each["name"] for each in self._engine.document["components"][component]["inputs"]}
        if {value.name for value in model.graph.inputs} != built:
            raise MoiieError(
                f"{self._engine.folder}: this version of moiie makes another graph for {component} than the engine's",
                f"build it again: {self._engine.build} --force",
            )
        return model

    def _job(self, component: str, graph: Path, plan: Path) -> EngineJob:
        document = self._engine.document
        described = document["components"][component]
        profiles = [
            Profile(each["name"], {name: (low, best, high) for name, (low, best, high) in each["sizes"].items()})
            for each in described["profiles"]
        ]
        library = self._plugins if described.get("plugins", True) else None
        embed = holds_plugins(self._engine)
        return EngineJob(component, graph, plan, profiles, tuple(document["sms"]), library, embed_plugins=embed)

    def _marked(self, component: str, plan: Path, found: Mapping[str, TensorSpec]) -> Engine:
        """The engine, described as what was built of it."""
        bundle = self._engine.bundle
        described = bundle.components[component]
        more = {name: _open(spec) for name, spec in found.items() if name not in described.inputs}
        components = {**bundle.components, component: replace(described, outputs={**more, **described.outputs})}
        record = FileRecord(sha256_file(plan), plan.stat().st_size)
        files = {**bundle.files, described.file: record}
        return replace(self._engine, bundle=replace(bundle, components=components, files=files))


def mark(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The graph with these values as outputs beside its own; TensorRT wants to know their types, but no shapes."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    known = {value.name for value in marked.graph.output}
    marked.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, types[name], None) for name in names if name not in known
    )
    return marked


def _open(spec: TensorSpec) -> TensorSpec:
    """With names for sizes that are only known at run time."""
    return TensorSpec(spec.dtype, tuple("?" if size == -1 else size for size in spec.shape))
