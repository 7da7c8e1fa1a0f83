"""The two sides of a bisection: the bundle's own graphs in Polygraphy's runner, a built form in the sessions that run it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import onnx

from moiie_export.parity.bisect_graphs import load_graph, marked
from moiie_export.parity.comparator import SessionRunner, onnxruntime_runner
from moiie_export.parity.values import Caches, caches_of
from moiie_runtime.backends import get_backend
from moiie_runtime.backends.session import EngineOptions, Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import PORTABLE, Engine
from moiie_runtime.errors import MoiieError


class Values(Protocol):
    """Runs an engine's graphs with values inside as outputs."""

    caches: Caches
    """Buffers for them."""

    def graph(self, component: str) -> onnx.ModelProto:
        """The graph without its weights."""

    def open(self, component: str, model: onnx.ModelProto, names: list[str]) -> AbstractContextManager[Session]:
        """A session of this graph with these values as outputs."""

    def close(self) -> None:
        """Give back what was made for it."""


def values_of(engine: Engine, options: EngineOptions, plugins: Path | None = None) -> Values:
    """What runs the graphs of this engine; the caller closes it.

    Args:
        engine: the built form.
        options: of its backend.
        plugins: where the plugin library lies that its engines hold, if they do.

    Raises:
        MissingDependency: the library is not there.
    """
    if engine.backend.startswith("tensorrt"):
        from moiie_export.parity.bisect_tensorrt import TensorRtValues

        return TensorRtValues(engine, options, plugins)
    return EngineValues(engine, options)


class EngineValues:
    """Graphs that ONNX Runtime executes. See `Values`."""

    def __init__(self, engine: Engine, options: EngineOptions) -> None:
        self._engine, self._options = engine, options
        self._opener: Any = get_backend(engine.backend)
        self.caches = caches_of(engine.bundle, options.device)
        self._again = f"build it again: {engine.build} --force"

    def graph(self, component: str) -> onnx.ModelProto:
        """The graph without its weights."""
        return load_graph(self._path(component), self._again)

    def open(self, component: str, model: onnx.ModelProto, names: list[str]) -> AbstractContextManager[Session]:
        """See `Values`."""
        folder, graph = self._path(component).parent, marked(model, names, caches=True)
        try:
            session: Session = self._opener(
                graph, component=component, threads=None, folder=folder, options=self._options
            )
        except MoiieError as error:
            if type(error) is not MoiieError:  # of the machine, not of the graph
                raise
            raise MoiieError(f"engine {self._engine.target}: {error.message}", self._again) from error
        return session

    def close(self) -> None:
        """Nothing is held."""

    def _path(self, component: str) -> Path:
        return self._engine.bundle.path(self._engine.bundle.components[component].file)


class Sides:
    """One component on both sides.

    Args:
        bundle: the portable one.
        engine: the built form.
        component: a graph of both.
        runs: what runs the engine's.

    Attributes:
        reference, built: the two graphs, without their weights.
    """

    def __init__(self, bundle: Bundle, engine: Engine, component: str, runs: Values) -> None:
        described = bundle.components[component]
        self._path = bundle.path(described.file)
        self._inputs, self._component, self._runs = described.inputs, component, runs
        self._names = (f"{PORTABLE} {component}", f"{engine.target} {component}")
        self.reference = load_graph(self._path, f"see what is damaged: moiie inspect {bundle.root} --verify")
        self.built = runs.graph(component)

    def runners(self, wanted: list[str], found: list[str]) -> tuple[Any, Any]:
        """Runners that give these values of the reference and of the engine."""
        graph = marked(self.reference, wanted, caches=False)
        reference = onnxruntime_runner(self._names[0], graph, self._path.parent)

        def open_session() -> AbstractContextManager[Session]:
            return self._runs.open(self._component, self.built, found)

        return reference, SessionRunner(self._names[1], open_session, self._inputs, self._runs.caches, found)
