"""Where does a built form begin to differ? Its values and those of the bundle's own graph, one after another.

Both graphs get the same inputs. What passes replaced kept its value's name, so most values inside an engine's graph have a
counterpart in the bundle's graph, which ONNX Runtime runs as the reference. Polygraphy runs the two sides and compares their
values in the order in which the engine computes them, `BLOCK` at a time, until one is further away than the recipe's bounds
allow: everything before it is right, so the fault lies between. Not a search by halves: a value behind the fault need not
differ (positions do not), and all values up to the middle would have to be kept at once.

Where a router's logits nearly tie, a form that rounds may choose other experts, and everything behind differs though nothing
is wrong. Then other inputs are tried, and what could not be compared with any is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moiie_export.graph.rewriting import ORIGIN
from moiie_export.parity.bisect_graphs import between, readable
from moiie_export.parity.bisect_inputs import made_up_inputs
from moiie_export.parity.bisect_sides import Sides, Values
from moiie_export.parity.bounds import bounds_kind, read_bounds
from moiie_export.parity.comparator import Verdict, judge, largest_of, outputs_of, results_of, run_both
from moiie_export.parity.metrics import Array
from moiie_export.recipe_parity import Bounds
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine
from moiie_runtime.kv_cache import static_rows

BLOCK = 48
"""Values that are outputs of one run: their memory is held at once."""

_SMALL = 1 << 15  # elements
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
        before: largest error among the values before it, which are right.
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
    before: float
    unseen: tuple[str, ...]

    def __str__(self) -> str:
        where = f", in {self.origin}" if self.origin else ""
        more = f"; or in one of {', '.join(self.unseen)}, whose results cannot be compared" if self.unseen else ""
        return (
            f"{self.component}: the first bad node is {self.node} ({self.op}){where}: {self.value} is off by "
            f"{self.error:.3g}, allowed are {self.bound:.3g}, and values before it are off by {self.before:.3g} at most{more}"
        )

    @property
    def gradual(self) -> bool:
        """Whether it is hardly further off than values before it, as when rounding adds up."""
        return self.error <= 2 * self.before


@dataclass(frozen=True)
class Bisection:
    """What was compared.

    Attributes:
        target: the engine's.
        bounds: which of the recipe's bounds held.
        compared: component -> values with a counterpart.
        worst: component -> largest error among values that are right.
        differences: the first one of each component that has one, in the order in which components run.
        ties: component -> the routes that nearly tied with all inputs; values behind them were not compared.
    """

    target: str
    bounds: str
    compared: Mapping[str, int]
    worst: Mapping[str, float]
    differences: tuple[Difference, ...]
    ties: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        found = [asdict(each) for each in self.differences]
        return {
            "target": self.target,
            "bounds": self.bounds,
            "compared": dict(self.compared),
            "worst": dict(self.worst),
            "differences": found,
            "ties": dict(self.ties),
        }


Keep = Callable[[Difference, Mapping[str, Array], Any], None]
"""Takes a difference, the inputs, and what both sides gave of its block: Polygraphy's `RunResults`."""


def bisect(bundle: Bundle, engine: Engine, runs: Values, progress: Progress, keep: Keep = lambda *_: None) -> Bisection:
    """Compare all graphs of an engine with those of its bundle.

    Args:
        bundle: the portable one.
        engine: the built form.
        runs: of `values_of`.
        progress: called with the component, values done and values in all.
        keep: called with each difference.

    Raises:
        MoiieError: a graph cannot be loaded or run.
    """
    kind = bounds_kind(bundle, engine, sorted(set(bundle.quantization.values())))
    bounds = getattr(read_bounds(bundle, [kind]), kind)
    compared, worst, found = {}, {}, []
    ties: dict[str, str] = {}
    for component in bundle.phases:
        comparison = _Comparison(component, Sides(bundle, engine, component, runs), bounds, progress)
        difference = comparison.first(bundle, static_rows(engine.bundle) or 1, keep)
        compared[component], worst[component] = comparison.done, comparison.worst
        found += [] if difference is None else [difference]
        ties |= {component: comparison.tied} if comparison.tied else {}
    return Bisection(engine.target, kind, compared, worst, tuple(found), ties)


class _Comparison:
    """One component."""

    def __init__(self, component: str, sides: Sides, bounds: Bounds, progress: Progress) -> None:
        self._component, self._sides, self._bounds, self._progress = component, sides, bounds, progress
        self.done = 0
        self.worst = 0.0
        self.tied = ""

    def first(self, bundle: Bundle, rows: int, keep: Keep) -> Difference | None:
        """The first value that differs; None when there is none. Looks for inputs without a near tie."""
        furthest = (-1, 0.0, "")
        for seed in _SEEDS:
            self.done, self.worst, self.tied = 0, 0.0, ""
            difference = self._scan(made_up_inputs(bundle, self._component, seed, rows), keep)
            if difference is not None or not self.tied:
                return difference
            furthest = max(furthest, (self.done, self.worst, self.tied))
        self.done, self.worst, self.tied = furthest
        return None

    def _scan(self, feeds: Mapping[str, Array], keep: Keep) -> Difference | None:
        there = readable(self._sides.reference)
        names = [name for node in self._sides.built.graph.node for name in node.output if name in there]
        for start in range(0, len(names), BLOCK):
            self._progress(self._component, start, len(names))
            block = names[start : start + BLOCK]
            routers = {_logits(name) for name in block if name.startswith(_IDS)}
            runners = self._sides.runners([*block, *sorted(routers & there - {*block})], block)
            runs = run_both(*runners, feeds)
            difference = self._first_in(block, runs, {*names[:start]})
            if difference is not None:
                keep(difference, feeds, runs)
            if difference is not None or self.tied:
                return difference
        self._progress(self._component, len(names), len(names))
        return None

    def _first_in(self, block: list[str], runs: Any, right: set[str]) -> Difference | None:
        """The first value of a block that differs, unless a near tie comes first."""
        wanted, found = outputs_of(runs)
        errors = _errors(wanted, found, self._bound)
        for name in block:
            logits, margin = wanted.get(_logits(name)), self._bounds.tie_margin
            if name.startswith(_IDS) and _near_tie(found[name], wanted[name], logits, margin):
                self.tied = name
                return None
            passed, error = errors[name]
            if not passed:
                return self._difference(name, error, right)
            self.worst = max(self.worst, error)
            self.done += 1
            right.add(name)
        return None

    def _bound(self, name: str) -> float:
        return 0.0 if name.startswith(_IDS) else self._bounds.hidden_error

    def _difference(self, name: str, error: float, right: set[str]) -> Difference:
        node = next(each for each in self._sides.built.graph.node if name in each.output)
        origin = next(each for each in self._sides.reference.graph.node if name in each.output)
        module = next((entry.value for entry in origin.metadata_props if entry.key == ORIGIN), "")
        unseen = tuple(each.name for each in between(self._sides.built.graph, node, right))
        numbers = (error, self._bound(name), self.worst)
        return Difference(self._component, name, node.name, node.op_type, module, *numbers, unseen)


def _errors(
    wanted: Mapping[str, Array], found: Mapping[str, Array], bound: Callable[[str], float]
) -> dict[str, tuple[bool, float]]:
    """Name -> whether Polygraphy finds it near enough, and its error as a share of the reference's largest number.

    It gets the elements that are not the same in both, as all its statistics of a whole cache take seconds, and small
    values together, in units of what is allowed, as they take milliseconds of anything; one by one when that fails.
    """
    errors = dict.fromkeys(found, (True, 0.0))
    apart = {name: pair for name, array in found.items() if (pair := _apart(wanted[name], array)) is not None}
    sizes = {name: largest_of(wanted[name]) for name in apart}
    allowed = {name: bound(name) * size for name, size in sizes.items()}
    small = [name for name, (a, b) in apart.items() if allowed[name] and a.shape == b.shape and a.size < _SMALL]
    if small:
        pairs = [[apart[name][side].astype(np.float64) / allowed[name] for name in small] for side in (0, 1)]
        joint = _verdicts({"all": (np.concatenate(pairs[0]), np.concatenate(pairs[1]))}, {"all": 1.0})["all"]
        if joint.passed:
            errors |= {name: (True, joint.largest * bound(name)) for name in small}
            apart = {name: pair for name, pair in apart.items() if name not in small}
    for name, verdict in _verdicts(apart, allowed).items():
        error = float("inf") if np.isnan(verdict.largest) else verdict.largest / sizes[name]
        errors[name] = (verdict.passed, error)
    return errors


def _verdicts(pairs: Mapping[str, tuple[Array, Array]], allowed: Mapping[str, float]) -> dict[str, Verdict]:
    if not pairs:
        return {}
    first, second = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    return judge(results_of({"bundle": first, "engine": second}), {name: allowed[name] for name in pairs})


def _apart(wanted: Array, found: Array) -> tuple[Array, Array] | None:
    """The elements that differ, all of them where shapes do; None where there is none."""
    if wanted.shape != found.shape:
        return wanted, found
    apart = (wanted != found) & ((wanted == wanted) | (found == found))  # numbers that are none on both sides agree
    return (wanted[apart], found[apart]) if apart.any() else None


def _logits(name: str) -> str:
    """The router's values behind `expert_ids.N`."""
    return name.replace(_IDS, _LOGITS)


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
