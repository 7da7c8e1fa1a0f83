"""One part of the page."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it.

    Attributes:
        slug: the address of its anchor.
        half: it leaves room for another one beside it on a wide screen.
    """

    slug: str
    title: str
    body: Markup
    half: bool = False
