"""What a comparison found: checks in the order they are judged, and the numbers behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Number = float | int | None


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        stage: what kind of thing: files, names, shapes, dtypes, attributes, manifest, prompt, modality, finite, vision,
            embedding, routing, router logits, expert weights, hidden states, KV cache, logits, ties, text, ...
        case: which prompt; empty when it concerns the whole bundle.
        phase: the graph's part in it: vision_encoder, prefill, decode; empty when none.
        where: the place, for example `layer 1 vision`; empty when there is only one.
        layer: the decoder layer, where there is one.
        metric: what `value` is, for example `error` or `agreement`.
        value: what was found; None when nothing could be measured.
        bound: what it is judged by: a largest value, for agreements a smallest.
        passed: the judgement.
        note: details: the worst position, ties, the first difference.
        ran: False for what was left out; `note` says why.
    """

    stage: str
    metric: str
    value: Number
    bound: Number
    passed: bool
    where: str = ""
    layer: int | None = None
    case: str = ""
    phase: str = ""
    note: str = ""
    ran: bool = True

    @property
    def name(self) -> str:
        """What is compared, in words: case, phase and stage."""
        what = " ".join(part for part in (self.phase, self.stage) if part)
        return f"{self.case}: {what}" if self.case else what

    @property
    def status(self) -> str:
        """`FAIL`, `not run`, `near` (passed, but beyond half of its bound or not without ties), or `ok`."""
        if not self.ran:
            return "not run"
        if not self.passed:
            return "FAIL"
        return "near" if self._near() else "ok"

    def sentence(self) -> str:
        """The finding as one sentence, the place first."""
        if not self.ran:
            return f"{self.name}: {self.note}"
        place = self.where if self.layer is None or "layer" in self.where else f"layer {self.layer}, {self.where}"
        verb = "agree" if self.passed else _VERBS.get(self.stage, "differ")
        verb += "" if self.stage.endswith("s") or self.stage in _VERBS else "s"
        judged = f"{self.metric} {_short(self.value)}" + ("" if self.bound is None else f", bound {_short(self.bound)}")
        return (
            (f"{place}: " if place else "") + f"{self.name} {verb}: {judged}" + (f" ({self.note})" if self.note else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON data; a value that is not a finite number becomes its name."""
        plain: dict[str, Any] = jsonable({**asdict(self), "name": self.name, "status": self.status})
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Check:
        """The check of which `to_dict` gave the data."""
        found = {each.name: data[each.name] for each in fields(cls)}
        found |= {name: float(found[name]) for name in ("value", "bound") if isinstance(found[name], str)}
        return cls(**found)

    def _near(self) -> bool:
        if self.value is None or not self.bound:
            return False
        if self.metric in SMALLEST:
            return self.value < (1 if self.metric == "agreement" else self.bound)
        if self.metric in NOTICED:
            return self.value > 0
        return self.value > self.bound / 2


SMALLEST = ("agreement", "equal tokens")
"""Metrics whose bound is a smallest value."""
NOTICED = ("tie share",)
"""Metrics where anything above zero is worth a look."""
_VERBS = {"finite": "fails", "ties": "are too many"}


COARSE = ("quantised logits", "quantised best token", "quantised routing")
"""Stages that say what quantisation costs; what the graphs make of the stored numbers is judged by the others."""


def judge(stage: str, metric: str, value: float, bound: float, **place: Any) -> Check:
    """A check of a number against its bound. NaN never passes."""
    passed = value >= bound if metric in SMALLEST else value <= bound
    return Check(stage, metric, value, bound, passed, **place)


def tell(stage: str, differences: Iterable[str], **place: Any) -> Check:
    """A check of things that must be equal; `differences` says which are not."""
    found = list(differences)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    note = f"{found[0]}{more}" if found else ""
    return Check(stage, "differences", len(found), 0, not found, note=note, **place)


def left_out(stage: str, reason: str, **place: Any) -> Check:
    """An entry for something that was not compared. It does not fail, but is never silent."""
    return Check(stage, "not run", None, None, True, note=f"not run: {reason}", ran=False, **place)


@dataclass
class Report:
    """All checks of one comparison; truthy when every one passed and something was compared.

    Attributes:
        bundle: the bundle's name.
        checkpoint: the checkpoint directory's name.
        dtype: how the bundle stores weights.
        checks: in the order they are judged: the first failure is where the difference begins.
        data: numbers for plots: bounds, and per case errors by layer, routing, margins, logits and texts.
    """

    bundle: str
    checkpoint: str
    dtype: str
    checks: list[Check] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(check.ran for check in self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, in order."""
        return [check for check in self.checks if not check.passed]

    @property
    def first_failure(self) -> Check | None:
        """The first check that failed."""
        return next(iter(self.failures), None)

    @property
    def first_layer(self) -> Check | None:
        """The first failed check that names a decoder layer."""
        return next((check for check in self.failures if check.layer is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON data: equal for equal comparisons, without times and local paths."""
        first = self.first_failure
        return {
            "bundle": self.bundle,
            "checkpoint": self.checkpoint,
            "dtype": self.dtype,
            "passed": bool(self),
            "verdict": self.verdict(),
            "first_failure": None if first is None else first.to_dict(),
            "checks": [check.to_dict() for check in self.checks],
            **jsonable(self.data),
        }

    def verdict(self) -> str:
        """The outcome in one sentence: the first failure, and the first diverging layer where that names none."""
        first, layer = self.first_failure, self.first_layer
        if first is None:
            near = sum(check.status == "near" for check in self.checks)
            skipped = sum(not check.ran for check in self.checks)
            extra = [f"{near} near the bound"] * bool(near) + [f"{skipped} not run"] * bool(skipped)
            compared = f"{len(self.checks) - skipped} checks passed"
            return ", ".join([compared, *extra])
        if layer is None or layer is first:
            return first.sentence()
        return f"{first.sentence()}; first in {layer.sentence()}"

    def summary(self) -> str:
        """A table of text: one line for each kind of check of each case, with its worst value and where that is."""
        lines = [_line(group) for group in _grouped(self.checks)]
        rows = [("", "compared", "metric", "worst", "bound", "where"), *lines]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = ["  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in table), "", self.verdict()])


def jsonable(value: Any) -> Any:
    """Plain JSON data: no tuples, no numpy numbers, NaN and infinities by name."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@dataclass(frozen=True)
class Group:
    """Checks of one kind; never empty."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> str:
        """The most alarming status in it."""
        order = ("FAIL", "near", "not run", "ok")
        return min((check.status for check in self.checks), key=order.index)

    @property
    def shown(self) -> Check:
        """The check that stands for all: the first failure, otherwise the worst value."""
        failed = next((check for check in self.checks if not check.passed), None)
        if failed is not None:
            return failed
        measured = [check for check in self.checks if check.value is not None] or self.checks
        return (min if measured[0].metric in SMALLEST else max)(measured, key=lambda check: check.value or 0)


def _grouped(checks: Iterable[Check]) -> list[Group]:
    """Checks of one kind together, whatever their case and layer; failures and what was not run apart for each case."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in checks:
        case = "" if check.ran and check.passed else check.case
        status = "FAIL" if not check.passed else "" if check.ran else check.note
        groups.setdefault((check.phase, check.stage, check.metric, case, status), []).append(check)
    return [Group(tuple(group)) for group in groups.values()]


def _line(group: Group) -> tuple[str, ...]:
    shown = group.shown
    what = " ".join(part for part in (shown.phase, shown.stage) if part)
    place = ", ".join(part for part in (shown.case, shown.where, shown.note) if part)
    count = f" [{len(group.checks)} fail]" if not shown.passed and len(group.checks) > 1 else ""
    bound = "" if shown.bound is None else _short(shown.bound)
    alone = shown.value or shown.note or not shown.ran
    return (group.status, what, shown.metric, _short(shown.value), bound, (place if alone else "") + count)


def _short(value: Number) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
