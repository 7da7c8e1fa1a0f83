"""`moiie check`: is a model supported on a target, how is each op computed, and does it fit?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moiie_export.cli.build import sm_list, with_sms
from moiie_export.cli.common import (
    CONTEXT,
    JSON_OPTION,
    VERBOSE_OPTION,
    byte_size,
    emit_json,
    note,
    table,
)
from moiie_runtime.errors import Unsound
from moiie_runtime.sizes import readable

if TYPE_CHECKING:
    from moiie_export.check.report import CheckReport

EPILOG = """\b
Examples:
  moiie check checkpoints/moiie-phi3 --target orin
  moiie check moiie-phi3-int4 --checkpoint checkpoints/moiie-phi3 --target rtx --sm 86 --json

\b
Built-in targets: cpu, ort-cuda, rtx, orin-nano, orin-nx, orin-32, orin,
thor, server.
A recipe adds others.

Nothing is exported or built, and neither torch nor TensorRT is loaded. Exits 3 when something is not supported.
"""

_AGAIN = "moiie check {} --checkpoint DIR --target NAME (of DIR only config, tokenizer and headers of weights are read)"


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.argument("source", metavar="CHECKPOINT|RECIPE")
@click.option("-t", "--target", "target_name", required=True, metavar="NAME", help="What it is to run on.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="DIR", help="The checkpoint of a RECIPE that names none."
)
@click.option(
    "--sm",
    callback=sm_list,
    metavar="LIST",
    help="For TensorRT: compute capabilities instead of the target's, e.g. 87,89.",
)
@click.option(
    "--memory", callback=byte_size, metavar="SIZE", help="Memory of the device, e.g. 32GB.  [default: the target's]"
)
@click.option("--max-context", type=click.IntRange(min=1), metavar="TOKENS", help="Longest prompt plus answer.")
@JSON_OPTION
@VERBOSE_OPTION
def command(
    source: str,
    target_name: str,
    checkpoint: Path | None,
    sm: tuple[int, ...] | None,
    memory: int | None,
    **options: int | None,
) -> None:
    """Check whether a target supports a model.

    Every op, on every GPU of the target, in the form its weights are stored; and whether it all fits in memory.
    """
    from moiie_export.check.report import check_model
    from moiie_export.cli.sources import export_inputs
    from moiie_export.recipe_targets import recipe_targets
    from moiie_export.source import ModelSource
    from moiie_export.targets import find_target

    directory, recipe = export_inputs(source, checkpoint, max_context=options["max_context"], again=_AGAIN)
    target = with_sms(find_target(target_name, recipe_targets(recipe.targets)), sm)
    target = replace(target, memory=memory or target.memory)
    with ModelSource.open(directory, recipe.model.vision_tower) as opened:
        report = check_model(opened, recipe, target)
    if options["as_json"]:
        emit_json(report.to_dict())
    else:
        _show(report)
    if not report.supported:
        raise _refusal(report)


def _show(report: CheckReport) -> None:
    target, memory = report.target, report.memory
    on = f" on SM {', '.join(map(str, target.sms))}" if target.sms else ""
    click.echo(f"{target.name}: {target.about}{on}, context {report.context}")
    for each in report.refused:
        click.echo(f"NO  {each.reason}")
    rows = [["", "op", "where", "dtype", "lowering", "reason"]]
    rows += [
        ["ok" if row.supported else "NO", row.op, row.where, row.dtype, row.lowering, row.reason] for row in report.rows
    ]
    if report.rows:
        click.echo(table(rows))
    if target.expected:
        note(
            "TensorRT 10 and 11 were never run here: what they support is expected, and the build on the device decides"
        )
    parts = {name.replace("_", " "): size for name, size in vars(memory).items()}
    budget = "" if target.memory is None else f" of {readable(target.memory)}"
    click.echo(f"predicted memory {readable(memory.peak)}{budget}:")
    click.echo(table([[name, readable(size)] for name, size in parts.items() if size], indent="  "))
    if target.residency == "after_prefill":
        note(f"after the prompt, vision encoder and vision experts leave: {readable(memory.answering(True))}")


def _refusal(report: CheckReport) -> Unsound:
    if report.refused:
        return Unsound(
            f"target {report.target.name}: {'; '.join(each.reason for each in report.refused)}",
            "choose others with --sm, or describe another target in the recipe's section `targets`",
        )
    wrong = [row for row in report.rows if not row.supported]
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return Unsound(
            f"target {report.target.name}: {first.op} of {first.where} ({first.dtype}): {first.reason}{more}",
            "change the target in the recipe's section `targets`, or the rules in `quantization`",
        )
    return Unsound(
        f"target {report.target.name}: predicted memory {readable(report.memory.peak)} "
        f"is more than its {readable(report.target.memory or 0)}",
        "quantise more, or use a shorter --max-context or smaller prefill profiles",
    )
