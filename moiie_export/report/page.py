"""The page: a headline and the sections that the document has something for. One file, no scripts, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from moiie_export.report import about, balance, instance, layers, logits, margins, quantisation, routing, texts, verdict
from moiie_export.report.document import Document
from moiie_export.report.html import visible
from moiie_export.report.section import Section

SECTIONS: tuple[Callable[[Document], Section | None], ...] = (
    verdict.section,
    layers.section,
    instance.section,
    routing.section,
    balance.section,
    margins.section,
    logits.section,
    texts.section,
    quantisation.section,
    verdict.left_out,
    about.section,
)
"""Every section in the order of the page. Each looks at the document and gives None where it has nothing to say, so a
model family that measures something else adds a row and changes no other."""


def render(document: Mapping[str, Any]) -> str:
    """The report of a comparison as one HTML page.

    Args:
        document: what `Report.to_dict` gave, or what `moiie parity --json` printed.

    Returns:
        HTML without references to anything outside itself, the same for the same document.

    Raises:
        MoiieError: it is no such document.
    """
    found = Document(document)
    sections = [section for build in SECTIONS if (section := build(found)) is not None]
    return _template().render(
        title=f"{found.report.bundle}: parity {'passed' if found.report else 'failed'}",
        style=Markup(_resource("style.css")),  # noqa: S704 - a file of this package
        headline=verdict.headline(found),
        sections=sections,
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return environment.from_string(_resource("page.html.jinja"))


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _resource(name: str) -> str:
    return (files("moiie_export.report") / name).read_text(encoding="utf-8")
