"""How the comparison was made, and what its words mean."""

from __future__ import annotations

from moiie_export.report.document import Document
from moiie_export.report.html import join, tag
from moiie_export.report.section import Section
from moiie_export.report.table import status_badge, table

_STATUSES = (
    ("ok", "within the bound"),
    ("near", "within the bound, but beyond half of it; or a router tie was settled as the bundle did"),
    ("FAIL", "beyond the bound, not equal, or NaN"),
    ("not run", "left out; the reason is given"),
)
_TERMS = (
    ("error", "the largest difference over the largest magnitude in the reference, or over 1 where that is smaller"),
    ("agreement", "the share of tokens that both sides send to the same experts, ties apart"),
    (
        "tie",
        "another expert was chosen where the probabilities are nearer than the tie margin; PyTorch then follows it",
    ),
    ("differences", "how many things are not equal"),
)


def section(document: Document) -> Section:
    """Words, statuses and bounds."""
    statuses = [(status_badge(status), meaning) for status, meaning in _STATUSES]
    words = [*statuses, *((term, meaning) for term, meaning in _TERMS)]
    body = [tag("dl", [tag("div", tag("dt", word), tag("dd", meaning)) for word, meaning in words], class_="words")]
    bounds = document.data.get("bounds")
    if bounds:
        rows = [[name.replace("_", " "), float(value)] for name, value in bounds.items()]
        body.append(table(f"Bounds for weights stored as {document.report.dtype}", ["bound", "value"], rows))
    return Section("about", "How to read this", join(body))
