"""`moiie upcycle`: dense checkpoint -> MoIIE checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note
from moiie_runtime.sizes import readable

EPILOG = """\b
Examples:
  moiie upcycle checkpoints/dense-phi3 -o checkpoints/moiie-phi3
  moiie upcycle checkpoints/dense-llama3 -o moiie-llama3 --experts 4 --top-k 2 --seed 1

A checkpoint that the authors' converter made, which has experts but no gates, gets its gates.
"""


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="DENSE_CHECKPOINT")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write."
)
@click.option("--experts", type=int, metavar="N", help="Experts in each odd layer.  [default: 4]")
@click.option("--top-k", type=int, metavar="K", help="Experts that run for a token.  [default: 2]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the gates, drawn from N(0, 0.02).")
@click.option("--check", is_flag=True, help="Read the result again and compare it with the input, bit by bit.")
@JSON_OPTION
@VERBOSE_OPTION
def command(checkpoint: Path, output: Path, check: bool, as_json: bool, **options: Any) -> None:
    """Turn a dense checkpoint into one with experts, to be trained.

    The feed-forward of every odd layer is copied to N experts, so that the new model first answers as the dense one does.
    """
    from moiie_export.cli.progress import Progress
    from moiie_export.cli.sources import checkpoint_directory
    from moiie_export.upcycle import Upcycling, check_upcycled, summary, upcycle

    checkpoint_directory(checkpoint)
    progress = Progress()
    result = upcycle(checkpoint, output, Upcycling(options["experts"], options["top_k"], options["seed"]), progress)
    progress.finish()
    if check:
        check_upcycled(checkpoint, output)
    if as_json:
        emit_json({**summary(result), "checked": check})
        return
    note(f"wrote {readable(result.bytes)}: {len(result.layers)} layers of {result.shape.num_experts} experts")
    click.echo(str(result.path))
