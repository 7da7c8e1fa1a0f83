"""The demos by name. A name costs nothing; the record behind it imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moiie_export.demo.family import DemoFamily

FAMILIES = ("moiie", "mome")


def demo_family(name: str) -> DemoFamily:
    """The demo of this name, one of FAMILIES."""
    from moiie_export.demo.moiie import MOIIE
    from moiie_export.demo.mome import MOME

    return {family.name: family for family in (MOIIE, MOME)}[name]
