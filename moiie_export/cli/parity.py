"""`moiie parity`: is the bundle the checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiie_export.cli.common import BUNDLE_ARGUMENT, CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note
from moiie_export.cli.progress import Progress
from moiie_runtime.errors import Unsound

EPILOG = """\b
Examples:
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --recipe my.yaml
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --report report.html
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --ranges

Both models get the same pictures and texts: those of the recipe's
parity.cases, or made-up ones. Compared, in this order: names, shapes, dtypes,
finite values, routing, hidden states, KV cache, logits, text. Exits 3 when a
check fails, and names the first one. A report is written either way: one HTML
file that needs neither network nor scripts.

A bundle with quantised weights is compared twice: its graphs with what its own
weights say, and these with the checkpoint's (parity.bounds.int8, int4, fp8).

--ranges compares nothing: it runs the checkpoint on the same prompts and shows
how large every layer's inputs and outputs get, by expert and modality, and
which do not fit float16.
"""


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@BUNDLE_ARGUMENT
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The checkpoint that the bundle was exported from.",
)
@click.option(
    "--vision-tower",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where a separate vision tower lies, as for export.",
)
@click.option("--recipe", metavar="RECIPE", help="Take parity.cases from this recipe.  [default: the bundle's own]")
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the comparison as one HTML page with charts.",
)
@click.option(
    "--png",
    "pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the charts as PNG files; needs matplotlib.",
)
@click.option(
    "--target", metavar="TARGET", help="Compare a form that `moiie build` made.  [default: the bundle's own graphs]"
)
@click.option("--ranges", is_flag=True, help="Measure how large activations get in the checkpoint's model instead.")
@JSON_OPTION
@VERBOSE_OPTION
def command(bundle: Path, checkpoint: Path, vision_tower: Path | None, recipe: str | None, **rest: Any) -> None:
    """Compare a bundle with its checkpoint in PyTorch."""
    ranges, as_json, target = (rest.pop(name) for name in ("ranges", "as_json", "target"))
    outputs: dict[str, Path | None] = rest
    from moiie_export.cli.sources import checkpoint_directory, need_extra
    from moiie_export.recipe import load_recipe
    from moiie_runtime.bundle import Bundle

    Bundle.open(bundle)
    checkpoint_directory(checkpoint)
    cases = None if recipe is None else load_recipe(recipe).parity.cases
    need_extra("export")
    if ranges:
        from moiie_export.cli.ranges import show_ranges

        if any(outputs.values()):
            raise click.UsageError("--ranges makes no report: leave --report and --png out, or use --json")
        show_ranges(checkpoint, vision_tower, cases, as_json=as_json)
        return
    need_extra("cpu")
    if outputs["pictures"] is not None:
        need_extra("report")
    if any(outputs.values()):
        from moiie_export.report import prepare

        prepare(**outputs)
    from moiie_export.parity import check_parity

    progress = Progress()
    report = check_parity(bundle, checkpoint, vision_tower=vision_tower, cases=cases, progress=progress, target=target)
    progress.finish()
    if as_json:
        emit_json(report.to_dict())
    else:
        click.echo(report.summary())
    written = _write(report.to_dict(), **outputs)
    if not report:
        first = report.first_failure
        hint = "export the bundle again from this checkpoint; if it still differs, the difference begins at that check"
        if first is not None and first.stage == "files":
            hint = "copy the bundle again, or write it again with `moiie export`"
        more = f"; see {written}" if written else ""
        raise Unsound(f"{bundle} is not the model of {checkpoint}: {report.verdict()}{more}", hint)
    if written:
        note(f"written: {written}")


def _write(document: dict[str, Any], page: Path | None, pictures: Path | None) -> str:
    """Write what was asked for, and say what that was."""
    written = []
    if page is not None:
        from moiie_export.report import write_report

        write_report(document, page)
        written.append(str(page))
    if pictures is not None:
        from moiie_export.report import write_pngs
        from moiie_export.report.numbers import counted

        paths = write_pngs(document, pictures)
        written.append(
            f"{counted(len(paths), 'picture')} in {pictures}" if paths else "no picture, as nothing was measured"
        )
    return " and ".join(written)
