"""Where does a built form begin to differ? Its values and those of the bundle's own graph, one after another.

Both graphs get the same inputs. What passes replaced kept its value's name, so most values inside an engine's graph have a
counterpart in the bundle's graph, which ONNX Runtime runs as the reference. They are compared in the order in which the
engine computes them, `BLOCK` at a time, until one is further away than the recipe's bounds allow: everything before it is
right, so the fault lies between. Not a search by halves: a value behind the fault need not differ (positions do not), and
all values up to the middle would have to be kept at once.

Where a router's logits nearly tie, a form that rounds may choose other experts, and everything behind differs though nothing
is wrong. Then other inputs are tried, and what could not be compared with any is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from moiie_export.graph.passes import ORIGIN
from moiie_export.parity.bisect_inputs import made_up_inputs
from moiie_export.parity.bounds import bounds_kind, read_bounds
from moiie_export.parity.metrics import Array
from moiie_export.parity.values import caches_of, values
from moiie_export.recipe_parity import Bounds
from moiie_runtime.backends import get_backend
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.backends.session import EngineOptions
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine
from moiie_runtime.kv_cache import static_rows

BLOCK = 48
"""Values that are outputs of one run: their memory is held at once."""

_IDS, _LOGITS = "expert_ids.", "router_logits."
_SEEDS = (11, 12, 13, 14, 15)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Difference:
    """The first value of a graph that is wrong.

    Attributes:
        component: the graph.
        value: its name, the same in both graphs.
        node, op: what computes it in the engine.
        origin: module of the reference model that it belongs to; empty where the bundle does not say.
        error: largest difference / max(1, largest number of the reference).
        bound: what is allowed.
        unseen: nodes between the values that are right and this one, whose own results have no counterpart: the fault
            may be in one of them.
    """

    component: str
    value: str
    node: str
    op: str
    origin: str
    error: float
    bound: float
    unseen: tuple[str, ...]

    def __str__(self) -> str:
        where = f", in {self.origin}" if self.origin else ""
        more = f"; or in one of {', '.join(self.unseen)}, whose results cannot be compared" if self.unseen else ""
        return (
            f"{self.component}: the first bad node is {self.node} ({self.op}){where}: {self.value} is off by "
            f"{self.error:.2g}, allowed are {self.bound:.2g}{more}"
        )


@dataclass(frozen=True)
class Bisection:
    """What was compared.

    Attributes:
        target: the engine's.
        compared: component -> values with a counterpart.
        worst: component -> largest error among values that are right.
        differences: the first one of each component that has one, in the order in which components run.
        ties: component -> the routes that nearly tied with all inputs; values behind them were not compared.
    """

    target: str
    compared: Mapping[str, int]
    worst: Mapping[str, float]
    differences: tuple[Difference, ...]
    ties: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        found = [asdict(each) for each in self.differences]
        return {
            "target": self.target,
            "compared": dict(self.compared),
            "worst": dict(self.worst),
            "differences": found,
            "ties": dict(self.ties),
        }


class Values(Protocol):
    """Runs an engine's graphs with values inside as outputs."""

    def graph(self, component: str) -> onnx.ModelProto:
        """The graph without its weights."""

    def run(
        self, component: str, model: onnx.ModelProto, names: list[str], feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The named values for these inputs."""

    def close(self) -> None:
        """Give back what was made for it."""


def values_of(engine: Engine, options: EngineOptions) -> Values:
    """What runs the graphs of this engine; the caller closes it."""
    if engine.backend.startswith("tensorrt"):
        from moiie_export.parity.bisect_tensorrt import TensorRtValues

        return TensorRtValues(engine, options)
    return EngineValues(engine, options)


class EngineValues:
    """Graphs that ONNX Runtime executes. See `Values`."""

    def __init__(self, engine: Engine, options: EngineOptions) -> None:
        self._engine, self._options = engine, options
        self._opener: Any = get_backend(engine.backend)

    def graph(self, component: str) -> onnx.ModelProto:
        """The graph without its weights."""
        return onnx.load(str(self._path(component)), load_external_data=False)

    def run(
        self, component: str, model: onnx.ModelProto, names: list[str], feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """See `Values`."""
        folder = self._path(component).parent
        with self._opener(
            marked(model, names), component=component, threads=None, folder=folder, options=self._options
        ) as session:
            return values(session, names, feeds, caches_of(self._engine.bundle, self._options.device))

    def close(self) -> None:
        """Nothing is held."""

    def _path(self, component: str) -> Path:
        return self._engine.bundle.path(self._engine.bundle.components[component].file)


def bisect(bundle: Bundle, engine: Engine, runs: Values, progress: Progress) -> Bisection:
    """Compare all graphs of an engine with those of its bundle.

    Args:
        bundle: the portable one.
        engine: the built form.
        runs: of `values_of`.
        progress: called with the component, values done and values in all.

    Raises:
        MoiieError: a graph cannot be loaded or run.
    """
    kind = bounds_kind(bundle, engine, sorted(set(bundle.quantization.values())))
    bounds = getattr(read_bounds(bundle, [kind]), kind)
    compared, worst, found = {}, {}, []
    ties: dict[str, str] = {}
    for component in bundle.phases:
        comparison = _Comparison(bundle, component, runs, bounds, static_rows(engine.bundle) or 1)
        difference = comparison.first(progress)
        compared[component], worst[component] = comparison.done, comparison.worst
        found += [] if difference is None else [difference]
        ties |= {component: comparison.tied} if comparison.tied else {}
    return Bisection(engine.target, compared, worst, tuple(found), ties)


class _Comparison:
    """One component."""

    def __init__(self, bundle: Bundle, component: str, runs: Values, bounds: Bounds, rows: int) -> None:
        self._bundle, self._component, self._engine, self._bounds = bundle, component, runs, bounds
        self._rows = rows
        self._path = bundle.path(bundle.components[component].file)
        self._reference = onnx.load(str(self._path), load_external_data=False)
        self._built = runs.graph(component)
        self.done = 0
        self.worst = 0.0
        self.tied = ""

    def first(self, progress: Progress) -> Difference | None:
        """The first value that differs; None when there is none. Looks for inputs without a near tie."""
        furthest = (-1, 0.0, "")
        for seed in _SEEDS:
            self.done, self.worst, self.tied = 0, 0.0, ""
            difference = self._scan(made_up_inputs(self._bundle, self._component, seed, self._rows), progress)
            if difference is not None or not self.tied:
                return difference
            furthest = max(furthest, (self.done, self.worst, self.tied))
        self.done, self.worst, self.tied = furthest
        return None

    def _scan(self, feeds: Mapping[str, Array], progress: Progress) -> Difference | None:
        there = _readable(self._reference)
        names = [name for node in self._built.graph.node for name in node.output if name in there]
        for start in range(0, len(names), BLOCK):
            progress(self._component, start, len(names))
            block = names[start : start + BLOCK]
            routers = [name.replace(_IDS, _LOGITS) for name in block if name.startswith(_IDS)]
            wanted = self._run_reference([*block, *(name for name in routers if name in there - {*block})], feeds)
            found = self._engine.run(self._component, self._built, block, feeds)
            for name in block:
                logits, margin = wanted.get(name.replace(_IDS, _LOGITS)), self._bounds.tie_margin
                if name.startswith(_IDS) and _near_tie(found[name], wanted[name], logits, margin):
                    self.tied = name
                    return None
                error = _error(found[name], wanted[name])
                if not error <= self._bounds.hidden_error:
                    return self._difference(name, error, {*names[: names.index(name)]})
                self.worst = max(self.worst, error)
                self.done += 1
        progress(self._component, len(names), len(names))
        return None

    def _run_reference(self, names: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        graph = marked(self._reference, names)
        with OnnxRuntimeSession(graph, component=f"reference {self._component}", folder=self._path.parent) as session:
            return values(session, names, feeds, caches_of(self._bundle))

    def _difference(self, name: str, error: float, right: set[str]) -> Difference:
        node = next(each for each in self._built.graph.node if name in each.output)
        origin = next(each for each in self._reference.graph.node if name in each.output)
        module = next((entry.value for entry in origin.metadata_props if entry.key == ORIGIN), "")
        unseen = tuple(each.name for each in _between(self._built.graph, node, right))
        bound = self._bounds.hidden_error
        return Difference(self._component, name, node.name, node.op_type, module, error, bound, unseen)


def _near_tie(found: Array, wanted: Array, logits: Array | None, margin: float) -> bool:
    """Whether there are tokens whose experts differ, and all have a router that hardly prefers the reference's."""
    if logits is None or found.shape != wanted.shape or np.array_equal(found, wanted):
        return False
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    odds /= odds.sum(axis=-1, keepdims=True)
    for row in np.flatnonzero((found != wanted).any(axis=-1)):
        lost = odds[row, sorted({*wanted[row]} - {*found[row]})]
        gained = odds[row, sorted({*found[row]} - {*wanted[row]})]
        swapped = odds[row, wanted[row]].max() - odds[row, wanted[row]].min()
        gap = lost.max() - gained.min() if len(lost) else swapped
        if not gap <= margin:
            return False
    return True


def _readable(model: onnx.ModelProto) -> set[str]:
    """The values inside a graph whose type numpy has."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    made = {name for node in model.graph.node for name in node.output}
    return {name for name in made if kinds.get(name) != onnx.TensorProto.BFLOAT16}


def _between(graph: onnx.GraphProto, node: onnx.NodeProto, right: set[str]) -> list[onnx.NodeProto]:
    """The nodes whose results lead to a node, and to no value that is known to be right."""
    cleared = set(right)
    for each in reversed(graph.node):
        if cleared.intersection(each.output):
            cleared.update(each.input)
    wanted, found = set(node.input), []
    for each in reversed(graph.node):
        if wanted.intersection(each.output) - cleared:
            found.append(each)
            wanted.update(each.input)
    return found[::-1]


def marked(model: onnx.ModelProto, names: list[str]) -> bytes:
    """The graph with these outputs beside its caches; weights stay references into their file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {value.name: value for value in copy.graph.output}
    caches = [value for name, value in kept.items() if name.startswith("present.")]
    del copy.graph.output[:]
    copy.graph.output.extend(caches)
    for name in names:
        if not name.startswith("present."):
            copy.graph.output.append(kept.get(name) or onnx.ValueInfoProto(name=name))
    return bytes(copy.SerializeToString())


def _error(found: Array, wanted: Array) -> float:
    """max|difference| / max(1, max|reference|); infinite for another shape, and where one is finite and the other not."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    difference = np.abs(a[finite] - b[finite])
    largest = np.abs(b[finite]).max(initial=1.0)
    return float(difference.max(initial=0.0) / largest)
