"""The verdict: the headline, the stages in the order they are judged, and the table of everything compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from moiie_export.parity.report import Check, Group
from moiie_export.report.document import Document
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import counted, short
from moiie_export.report.section import Section
from moiie_export.report.table import STATUS_CLASS, folded, scrolling, status_badge, table

_ORDER = ("FAIL", "near", "not run", "ok")


def headline(document: Document) -> Markup:
    """Passed or failed, what failed first, and what was compared."""
    report = document.report
    passed = bool(report)
    said = "is the model of its checkpoint" if passed else "is not the model of its checkpoint"
    return tag(
        "header",
        tag("p", tag("span", "passed" if passed else "failed", class_=f"verdict {'ok' if passed else 'fail'}")),
        tag("h1", tag("span", report.bundle, class_="name"), f" {said}"),
        _first(document),
        _facts(document),
    )


def section(document: Document) -> Section:
    """Stages and the table of checks."""
    lead = tag(
        "p",
        "One row for each kind of check over all cases, with its worst value, or its first failure where one failed. They "
        "are judged in this order, case by case and layer by layer, so the first failure is where the difference begins.",
        class_="lead",
    )
    body = [_stages(document.checks), lead, _groups(document.checks), _all(document.checks)]
    return Section("checks", "Verdict", join(body))


def left_out(document: Document) -> Section | None:
    """What was not compared and why; None where nothing was left out."""
    missing = [check for check in document.checks if not check.ran]
    if not missing:
        return None
    items = [tag("li", tag("strong", _what(check)), ": ", check.note.removeprefix("not run: ")) for check in missing]
    return Section("left-out", "Not compared", tag("ul", items))


def _first(document: Document) -> Markup | None:
    """What failed first, in a box of its own; where the difference reaches a layer only later, that too."""
    first, layer = document.report.first_failure, document.report.first_layer
    if first is None:
        return None if document.report else tag("p", "Nothing was compared.", class_="first")
    later = None
    if layer is not None and layer is not first:
        later = tag("p", "First layer: ", tag("strong", _what(layer)), f" ({_judged(layer)})")
    return tag(
        "div",
        tag("p", "Failed first", class_="key"),
        tag("p", _what(first), class_="what"),
        tag("p", _judged(first)),
        tag("p", first.note, class_="note") if first.note else None,
        later,
        class_="first",
    )


def _what(check: Check) -> str:
    """Place, phase, stage and case of a check in words."""
    place = check.where if check.layer is None or "layer" in check.where else f"layer {check.layer}, {check.where}"
    what = " ".join(part for part in (check.phase, check.stage) if part)
    return ", ".join(part for part in (place, what, f"case “{check.case}”" if check.case else "") if part)


def _judged(check: Check) -> str:
    bound = "" if check.bound is None else f", bound {short(check.bound)}"
    return f"{check.metric} {short(check.value)}{bound}"


def _facts(document: Document) -> Markup:
    report = document.report
    counts = {status: sum(check.status == status for check in report.checks) for status in _ORDER}
    words = {"FAIL": "failed", "near": "near the bound", "not run": "not run", "ok": "passed"}
    checks = ", ".join(f"{counts[status]} {words[status]}" for status in ("ok", *_ORDER[:3]) if counts[status])
    facts: list[tuple[str, Any]] = [
        ("checkpoint", report.checkpoint),
        ("weights stored as", report.dtype),
        ("checks", checks),
    ]
    if document.cases:
        steps = document.data.get("decode_steps")
        decoded = f", {counted(steps, 'decode step')} each" if steps is not None else ""
        facts.append(("cases", f"{len(document.cases)}{decoded}"))
    model = document.data.get("model")
    if model:
        facts.append(("model", _model(model)))
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts])


def _model(model: dict[str, Any]) -> str:
    moe = model.get("moe")
    experts = f", {moe['num_experts']} experts in {len(moe['layers'])} of them, top {moe['top_k']}" if moe else ""
    return f"{model['model_type']}, {counted(model['num_hidden_layers'], 'layer')}{experts}"


def _stages(checks: Sequence[Check]) -> Markup:
    """The stages in order with the most alarming status of each."""
    stages: dict[str, list[Check]] = {}
    for check in checks:
        stages.setdefault(check.stage, []).append(check)
    failed = next((check.stage for check in checks if not check.passed), None)
    items = []
    for stage, found in stages.items():
        status = min((check.status for check in found), key=_ORDER.index)
        first = tag("strong", "first") if stage == failed else None
        items.append(tag("li", stage, " ", tag("b", status), " ", first, class_=STATUS_CLASS[status]))
    return tag("ol", items, class_="stages", aria_label="Stages in the order they are judged")


def _groups(checks: Sequence[Check]) -> Markup:
    head = [("", ""), ("compared", ""), ("worst", "n"), ("bound", "n"), ("where", "where"), ("checks", "n")]
    names = [tag("th", name, scope="col", class_=kind or None, role="columnheader") for name, kind in head]
    kinds: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        kinds.setdefault((check.phase, check.stage, check.metric), []).append(check)
    first = next((check for check in checks if not check.passed), None)
    body = [_group(Group(tuple(found)), first) for found in kinds.values()]
    inside = (
        tag("caption", "Everything compared, by kind"),
        tag("thead", tag("tr", names, role="row"), role="rowgroup"),
        tag("tbody", body, role="rowgroup"),
    )
    return scrolling(tag("table", inside, class_="verdicts", role="table"), "Everything compared, by kind")


def _group(group: Group, first: Check | None) -> Markup:
    shown = group.shown
    what = " ".join(part for part in (shown.phase, shown.stage) if part)
    telling = shown.value or shown.note or not shown.ran
    place = ", ".join(part for part in (shown.case, shown.where) if part) if telling else ""
    failed = [check for check in group.checks if not check.passed]
    metric = tag("small", shown.metric) if shown.ran else None
    mark = tag("small", "failed first", class_="mark") if shown is first else None
    count = f"{len(failed)} of {len(group.checks)} fail" if failed else str(len(group.checks))
    return tag(
        "tr",
        tag("td", status_badge(group.status), role="cell"),
        tag("th", what, metric, mark, scope="row", role="rowheader"),
        tag("td", short(shown.value), class_="n", role="cell"),
        tag("td", None if shown.bound is None else short(shown.bound), class_="n", role="cell"),
        tag("td", place, tag("small", shown.note) if shown.note else None, _spread(group), class_="where", role="cell"),
        tag("td", count, class_="n count", role="cell"),
        class_=STATUS_CLASS[group.status],
        role="row",
    )


def _spread(group: Group) -> Markup | None:
    """In how many cases a kind of check fails, and where it does not, if there are several cases."""
    failing: dict[str, bool] = {}
    for check in group.checks:
        failing[check.case] = failing.get(check.case, False) or not check.passed
    passing = [case for case, fails in failing.items() if not fails]
    if len(failing) < 2 or len(passing) == len(failing):
        return None
    if not passing:
        return tag("small", f"in all {len(failing)} cases")
    kept = f"; not in {', '.join(passing)}" if len(passing) < 3 else ""
    return tag("small", f"in {len(failing) - len(passing)} of {len(failing)} cases{kept}")


def _all(checks: Sequence[Check]) -> Markup:
    columns = ["status", "stage", "phase", "layer", "value", "bound", "metric", "case", "where", "note"]
    rows = [
        [
            status_badge(each.status),
            each.stage,
            each.phase,
            each.layer,
            each.value,
            each.bound,
            each.metric,
            each.case,
            each.where,
            each.note,
        ]
        for each in checks
    ]
    return folded(
        f"All {counted(len(rows), 'check')}", table("All checks, in the order they are judged", columns, rows)
    )
