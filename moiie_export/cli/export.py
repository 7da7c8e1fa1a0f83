"""`moiie export`: checkpoint -> bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note, table
from moiie_export.cli.progress import Progress
from moiie_runtime.sizes import readable

if TYPE_CHECKING:
    from moiie_export.pipeline import Plan

EPILOG = """\b
Examples:
  moiie export checkpoints/moiie-phi3 -o moiie-phi3.bundle
  moiie export moiie-phi3 --checkpoint checkpoints/moiie-phi3 -o moiie-phi3.bundle
  moiie export my.yaml -o my.bundle --dry-run

An export that was interrupted is resumed by the same command.
"""


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.argument("source", metavar="CHECKPOINT|RECIPE")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="BUNDLE", help="Directory to write."
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoint for a recipe that names none, or another one.",
)
@click.option(
    "--vision-tower",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where a separate vision tower lies, when not where config.json says.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), help="How weights are stored.  [default: the recipe's]"
)
@click.option(
    "--max-context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest prompt plus answer.  [default: the recipe's, or the model's own limit]",
)
@click.option("--dry-run", is_flag=True, help="Show the stages and what each would do; write nothing.")
@click.option("--force", is_flag=True, help="Do every stage again, also those that are up to date.")
@JSON_OPTION
@VERBOSE_OPTION
def command(source: str, output: Path, dry_run: bool, force: bool, as_json: bool, **overrides: Any) -> None:
    """Export a checkpoint to a bundle.

    A bundle holds ONNX graphs, weights, tokenizer and manifest. CHECKPOINT is a directory with config.json and weights;
    RECIPE is the name of a shipped recipe or a YAML file.
    """
    from moiie_export.cli.sources import export_inputs, need_extra

    checkpoint, recipe = export_inputs(source, **overrides)
    need_extra("export")
    from moiie_export.pipeline import ExportRequest, export_bundle, plan

    request = ExportRequest(
        checkpoint=checkpoint, output=output, recipe=recipe, vision_tower=overrides["vision_tower"], force=force
    )
    if dry_run:
        _show_plan(plan(request), output, as_json)
        return
    progress = Progress()
    result = export_bundle(request, progress=progress)
    progress.finish()
    if as_json:
        emit_json({"bundle": result.path, "seconds": result.seconds, "stages": result.stages, "files": result.files})
        return
    size = sum(path.stat().st_size for path in Path(result.path).rglob("*") if path.is_file())
    note(f'wrote {readable(size)} in {result.seconds:.1f} s; next: moiie run {result.path} -p "..."')
    click.echo(str(result.path))


def _show_plan(planned: Plan, output: Path, as_json: bool) -> None:
    stages = [{"name": each.name, "action": each.action, "reason": each.reason} for each in planned.stages]
    if as_json:
        emit_json({"bundle": output, "bytes": planned.bytes, "stages": stages})
        return
    click.echo(table([[each["name"], each["action"], each["reason"]] for each in stages]))
    click.echo(f"{output} would hold about {readable(planned.bytes)}")
