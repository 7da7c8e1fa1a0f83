"""`moiie parity --ranges`: what does not fit float16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moiie_export.cli.common import emit_json, note, table
from moiie_export.cli.progress import Progress

if TYPE_CHECKING:
    from moiie_export.model.ranges import Range, Ranges
    from moiie_export.recipe_parity import ParityCase

_SHOWN = 20


def show_ranges(
    checkpoint: Path, vision_tower: Path | None, cases: Sequence[ParityCase] | None, *, as_json: bool
) -> None:
    """Measure, print what is largest, and say which layers must stay float32 where others become float16.

    Args:
        checkpoint: the checkpoint.
        vision_tower: where a separate tower lies.
        cases: the recipe's; nothing for the made-up picture and texts that parity uses.
        as_json: print all tensors as JSON instead.
    """
    from moiie_export.model.ranges import measure_ranges
    from moiie_export.parity.cases import from_recipe, made_up
    from moiie_export.source import ModelSource

    progress = Progress()
    with ModelSource.open(checkpoint, vision_tower) as source:
        questions = from_recipe(cases) if cases else made_up()
        found = measure_ranges(source, questions, lambda done, total: progress("ranges", done, total))
    progress.finish()
    if as_json:
        emit_json(found.to_dict())
        return
    click.echo("\n".join(_lines(found)))
    if not cases:
        note("measured on made-up pictures; a recipe with parity.cases of your own kind tells more: --recipe FILE")


def _lines(found: Ranges) -> list[str]:
    from moiie_export.model.ranges import FLOAT16_MAX, MARGIN, MODALITIES

    exceeding = found.exceeding
    largest = sorted(found.found, key=lambda each: -each.peak)
    shown = [*exceeding, *[each for each in largest if each.status == "fits"][: max(0, _SHOWN - len(exceeding))]]
    rows = [["tensor", "", *MODALITIES, ""], *(_row(each, MODALITIES) for each in shown)]
    lines = [table(rows)]
    if len(shown) < len(found.found):
        lines.append(f"and {len(found.found) - len(shown)} smaller ones; --json lists every tensor")
    limit = f"float16 ({FLOAT16_MAX:.0f}, with a margin of {MARGIN:g})"
    if not exceeding:
        return [*lines, "", f"everything fits {limit}"]
    lines += ["", f"{len(exceeding)} of {len(found.found)} tensors do not fit {limit}"]
    if found.islands:
        lines += ["layers that must stay float32 there, for a recipe:", "export:", "  islands:"]
        lines += [f"    - {name}" for name in found.islands]
    return lines


def _row(each: Range, modalities: Sequence[str]) -> list[str]:
    peaks = [f"{each.peaks[modality]:.4g}" if modality in each.peaks else "-" for modality in modalities]
    return [each.name, each.kind, *peaks, "" if each.status == "fits" else each.status]
