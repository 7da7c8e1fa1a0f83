"""`moiie parity`: is the bundle the checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiie_export.cli.common import (
    BUNDLE_ARGUMENT,
    CONTEXT,
    GPU_OPTION,
    JSON_OPTION,
    VERBOSE_OPTION,
    emit_json,
    note,
)
from moiie_export.cli.progress import Progress
from moiie_runtime.errors import Unsound

if TYPE_CHECKING:
    from moiie_export.parity.report import Report

EPILOG = """\b
Examples:
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --recipe my.yaml
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --report report.html
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --ranges
  moiie parity moiie-phi3.bundle --checkpoint checkpoints/moiie-phi3 --target rtx
  moiie parity moiie-phi3.bundle --bisect --target cpu
  moiie parity moiie-phi3.bundle --bisect --target cpu --save differences
  moiie parity moiie-phi3.bundle --bisect --target rtx --plugins libmoiie_plugins.so

Both models get the same pictures and texts: those of the recipe's
parity.cases, or made-up ones. Compared, in this order: names, shapes, dtypes,
finite values, routing, hidden states, KV cache, logits, text. Exits 3 when a
check fails, and names the first one. --report writes one HTML file, whether they
fail or not; it needs neither network nor scripts.

A bundle with quantised weights is compared twice: its graphs with what its own
weights say, and these with the checkpoint's (parity.bounds.int8, int4, fp8).

--target compares through a form that was built, on the device that it is for;
what it does not give (hidden states, most often) is listed as not run.

--bisect needs no checkpoint: Polygraphy runs a built form and the bundle's own
graphs on the same inputs and compares them; the first node is named whose result
differs by more than the recipe's bounds. Exits 3 when there is one. --save then
writes, as Polygraphy's JSON, the inputs and the values of both sides up to that
node, and shows the commands of Polygraphy that look at them. Engines of TensorRT
that hold their plugin library are built again with it: --plugins. --bisect and
--polygraphy need the extra `polygraphy`; --bisect needs no PyTorch.

--ranges compares nothing: it runs the checkpoint on the same prompts and shows
how large every layer's inputs and outputs get, by expert and modality, and
which do not fit float16.
"""

_UNREAD = {
    "bisect": ("looks at a built form on made-up inputs", ("recipe", "report", "png", "ranges", "polygraphy")),
    "ranges": ("compares nothing", ("target", "polygraphy")),
    "polygraphy": ("takes made-up inputs", ("recipe",)),
}
"""What an option has no use for, and why."""


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@BUNDLE_ARGUMENT
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The checkpoint that the bundle was exported from; needed without --bisect.",
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
@click.option("--bisect", is_flag=True, help="Find the first node of TARGET that differs from the bundle's own graphs.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write inputs and outputs of what --bisect found, for Polygraphy.",
)
@click.option(
    "--plugins",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --bisect: the plugin library that TARGET's engines hold.  [default: plugins-build/libmoiie_plugins.so]",
)
@GPU_OPTION
@click.option(
    "--polygraphy", is_flag=True, help="Let Polygraphy run both sides, one graph after another, and compare them."
)
@click.option("--ranges", is_flag=True, help="Measure how large activations get in the checkpoint's model instead.")
@JSON_OPTION
@VERBOSE_OPTION
def command(bundle: Path, checkpoint: Path | None, vision_tower: Path | None, recipe: str | None, **rest: Any) -> None:
    """Compare a bundle with its checkpoint in PyTorch."""
    outputs: dict[str, Path | None] = {name: rest.pop(name) for name in ("page", "pictures")}
    as_json, target = rest["as_json"], rest["target"]
    _refuse_unread(
        {**rest, "checkpoint": checkpoint, "recipe": recipe, "report": outputs["page"], "png": outputs["pictures"]}
    )
    if rest["bisect"]:
        from moiie_export.cli.bisect import show_bisection

        show_bisection(bundle, target, **{name: rest[name] for name in ("save", "plugins", "gpu", "as_json")})
        return
    assert checkpoint is not None
    from moiie_export.cli.sources import checkpoint_directory, need_extra
    from moiie_export.recipe import load_recipe
    from moiie_runtime.bundle import Bundle

    Bundle.open(bundle)
    checkpoint_directory(checkpoint)
    cases = None if recipe is None else load_recipe(recipe).parity.cases
    need_extra("export")
    if rest["ranges"]:
        from moiie_export.cli.ranges import show_ranges

        show_ranges(checkpoint, vision_tower, cases, as_json=as_json)
        return
    _prepare(outputs)
    progress = Progress()
    if rest["polygraphy"]:
        need_extra("polygraphy")
        from moiie_export.parity.polygraphy import compare_with_polygraphy

        report = compare_with_polygraphy(bundle, checkpoint, vision_tower, target, progress, gpu=rest["gpu"])
    else:
        from moiie_export.parity import check_parity

        report = check_parity(
            bundle,
            checkpoint,
            vision_tower=vision_tower,
            cases=cases,
            progress=progress,
            target=target,
            gpu=rest["gpu"],
        )
    progress.finish()
    _show(report, (bundle, checkpoint, target), outputs, as_json=as_json)


def _refuse_unread(given: dict[str, Any]) -> None:
    """Refuse options that do not go together, before anything is read."""
    if given["bisect"] and given["target"] is None:
        raise click.UsageError("--bisect goes with --target: it looks into what `moiie build` made")
    if given["save"] is not None and not given["bisect"]:
        raise click.UsageError("--save goes with --bisect: it keeps what differs")
    if given["plugins"] is not None and not given["bisect"]:
        raise click.UsageError("--plugins goes with --bisect: it builds graphs again")
    if given["gpu"] is not None and given["target"] is None:
        raise click.UsageError("--gpu goes with --target: the bundle's own graphs run on no GPU")
    if given["checkpoint"] is None and not given["bisect"]:
        raise click.UsageError("missing option '--checkpoint'")
    for name in ("ranges", "polygraphy"):
        if given[name] and (given["report"] or given["png"]) and not given["bisect"]:
            raise click.UsageError(f"--{name} makes no report: leave --report and --png out, or use --json")
    for name, (why, unread) in _UNREAD.items():
        for each in unread:
            if given[name] and given[each]:
                raise click.UsageError(f"--{name} {why}: leave --{each} out")


def _prepare(outputs: dict[str, Path | None]) -> None:
    """Refuse what would fail when all has been compared."""
    from moiie_export.cli.sources import need_extra

    need_extra("cpu")
    if outputs["pictures"] is not None:
        need_extra("report")
    if any(outputs.values()):
        from moiie_export.report import prepare

        prepare(**outputs)


def _show(
    report: Report, compared: tuple[Path, Path, str | None], outputs: dict[str, Path | None], *, as_json: bool
) -> None:
    if as_json:
        emit_json(report.to_dict())
    else:
        click.echo(report.summary())
    written = _write(report.to_dict(), **outputs)
    if not report:
        bundle, checkpoint, target = compared
        finding, hint = _finding(report, bundle, checkpoint, target)
        more = f"; see {written}" if written else ""
        form = "" if target is None else f" as built for {target}"
        raise Unsound(f"{bundle}{form} {finding}: {report.verdict()}{more}", hint)
    if written:
        note(f"written: {written}")


def _finding(report: Report, bundle: Path, checkpoint: Path, target: str | None) -> tuple[str, str]:
    """What a report that failed says of a bundle, and what to do."""
    from moiie_export.parity.report import COARSE

    if all(each.stage in COARSE for each in report.failures):  # it computes what is stored; that is too coarse
        return (
            f"differs from {checkpoint} by more than its recipe allows",
            "give more bits, or awq or gptq, to what matters most (quantization.rules), or allow more (parity.bounds)",
        )
    wrong = f"is not the model of {checkpoint}"
    if report.failures[0].stage == "files":
        return wrong, "copy the bundle again, or write it again with `moiie export`"
    if target is not None:
        return wrong, (
            f"compare the bundle itself, without --target; if that holds, moiie parity {bundle} --bisect --target "
            f"{target} names the first node that differs"
        )
    return wrong, (
        "export the bundle again from this checkpoint; if it still differs, the difference begins at that check"
    )


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
