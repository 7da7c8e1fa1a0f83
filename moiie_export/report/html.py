"""HTML and SVG elements from Python values. Every string is untrusted and escaped; only `Markup` passes as it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup, escape

Child = Any
"""Text, a number, `Markup`, None (nothing), or an iterable of these."""

_VOID = frozenset({"meta", "br", "hr"})
_LINE_BREAKS = frozenset("\n\t")
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"})


def tag(element: str, *children: Child, **attributes: Any) -> Markup:
    """One element.

    Args:
        element: its name.
        children: what it holds.
        attributes: a trailing `_` is dropped and other `_` become `-`; None and False leave the attribute out, True
            writes it without a value, floats lose digits that no screen shows.
    """
    written = "".join(_attribute(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    if element in _VOID:
        return Markup(f"<{element}{written}>")  # noqa: S704 - escaped below
    inside = "".join(_flat(children))
    return Markup(f"<{element}{written}>{inside}</{element}>")  # noqa: S704 - escaped below


def join(children: Iterable[Child]) -> Markup:
    """Several children as one."""
    return Markup("").join(_flat(children))


def visible(text: str) -> str:
    r"""The text with characters that have no glyph, or that turn the line round, as escapes such as `\x1b`."""
    return "".join(character if character.isprintable() else _shown(character) for character in text)


def _shown(character: str) -> str:
    if character in _LINE_BREAKS or unicodedata.category(character) not in _UNPRINTABLE:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _flat(children: Iterable[Child]) -> Iterable[Markup]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str):
            yield escape(visible(child))
        elif isinstance(child, Iterable):
            yield from _flat(child)
        else:
            yield escape(str(child))


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {name}="{escape(visible(str(value)))}"'
