"""`moiie demo`: a trained model from checkpoint to answers, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note, table
from moiie_runtime.errors import Unsound

if TYPE_CHECKING:
    from moiie_export.demo.evaluate import Ablation, Accuracy
    from moiie_export.demo.show import Shown
    from moiie_runtime.routing import RoutingStats
    from moiie_runtime.vlm import VLM

EPILOG = """\b
Examples:
  moiie demo
  moiie demo --seed 7 -o build/demo
  moiie demo --eval 500
  moiie demo --eval 500 --ablate --json

The model has about two million parameters and was trained from nothing on
drawn pictures of coloured shapes; see recipes/demo.
"""


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("moiie-demo"),
    metavar="DIR",
    help="Directory for the bundle and the picture.",
)
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="DIR", help="A demo model trained by yourself.")
@click.option("--eval", "count", type=click.IntRange(min=1), metavar="N", help="Accuracy on N held-out questions.")
@click.option("--ablate", is_flag=True, help="Also accuracy without the picture, vision experts or vision gate.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which picture, or which held-out questions.")
@JSON_OPTION
@VERBOSE_OPTION
def command(output: Path, checkpoint: Path | None, seed: int, as_json: bool, **options: Any) -> None:
    """Export a small trained model, prove the bundle, and ask it about a picture.

    With --eval it measures instead: the share of right answers of the PyTorch model and of the bundle, from 0 to 1.
    """
    from moiie_export.cli.progress import Progress
    from moiie_export.cli.sources import checkpoint_directory, need_extra

    need_extra("cpu")
    need_extra("export")
    import moiie_runtime
    from moiie_export.demo.shipped import export_demo, shipped_checkpoint

    found = shipped_checkpoint() if checkpoint is None else checkpoint_directory(checkpoint)
    progress = Progress()
    bundle = export_demo(output, found, progress)
    progress.finish()
    with moiie_runtime.load(bundle) as vlm:
        if options["count"] or options["ablate"]:
            _evaluate(vlm, found, (options["count"] or 500, seed, options["ablate"]), as_json)
        else:
            _show(vlm, found, (output, seed), as_json)


def _evaluate(vlm: VLM, checkpoint: Path, wanted: tuple[int, int, bool], as_json: bool) -> None:
    from moiie_export.demo.evaluate import ablations, bundle_answers, prompts_of, pytorch_answers, score
    from moiie_export.model.load import load_model
    from moiie_export.source import ModelSource
    from moiie_recipes.demo.held_out import held_out

    count, seed, ablate = wanted
    items = held_out(count, seed)
    with ModelSource.open(checkpoint) as source:
        model = load_model(source, vlm.bundle.dtype)
    note(f"{count} held-out questions, seed {seed}")
    bundle = score(items, bundle_answers(vlm, items))
    pytorch = score(items, pytorch_answers(model, vlm, prompts_of(vlm, items)))
    without = ablations(model, vlm, items) if ablate else []
    if as_json:
        emit_json(_document(wanted, pytorch, bundle, without))
        return
    rows = [("bundle", bundle), ("PyTorch", pytorch), *((each.name, each.accuracy) for each in without)]
    kinds = list(bundle.by_kind)
    head = ["", "all", "one thing", *kinds]
    click.echo(table([head, *([name, *_percent(accuracy)] for name, accuracy in rows)]))


def _percent(accuracy: Accuracy) -> list[str]:
    shares = [accuracy.overall, accuracy.one_thing, *accuracy.by_kind.values()]
    return [f"{share:.1%}" if share == share else "-" for share in shares]


def _document(
    wanted: tuple[int, int, bool], pytorch: Accuracy, bundle: Accuracy, without: list[Ablation]
) -> dict[str, Any]:
    count, seed, _ = wanted
    document: dict[str, Any] = {
        "questions": count,
        "seed": seed,
        "pytorch_accuracy": pytorch.overall,
        "bundle_accuracy": bundle.overall,
        "pytorch": pytorch,
        "bundle": bundle,
    }
    return document | ({"ablations": {each.name: each.accuracy for each in without}} if without else {})


def _show(vlm: VLM, checkpoint: Path, wanted: tuple[Path, int], as_json: bool) -> None:
    from moiie_export.cli.progress import Progress
    from moiie_export.demo.show import show
    from moiie_export.parity import check_parity

    output, seed = wanted
    bundle = vlm.bundle.root
    progress = Progress()
    report = check_parity(bundle, checkpoint, progress=progress)
    progress.finish()
    if not as_json:
        click.echo(report.summary())
    if not report:
        raise Unsound(
            f"{bundle} is not the model of {checkpoint}: {report.verdict()}", f"remove {bundle} and run again"
        )
    shown = show(vlm, output, seed)
    if as_json:
        emit_json({"bundle": bundle, "parity": report.to_dict(), "picture": shown.picture, **_shown(shown)})
        return
    click.echo(f"\n{shown.picture}")
    for each in shown.answers:
        verdict = "" if each.answer == each.expected else f"   (wrong: {each.expected})"
        click.echo(f"  {each.question}\n    {each.answer}{verdict}")
    click.echo("\nwhich experts the tokens went to\n" + _routing_table(shown.routing))
    note(f'\nnext: moiie run {bundle} -i {shown.picture} -p "{shown.answers[0].question}" --routing')


def _shown(shown: Shown) -> dict[str, Any]:
    return {"answers": shown.answers, "routing": shown.routing.rows()}


def _routing_table(stats: RoutingStats) -> str:
    rows: dict[tuple[int, str], list[int]] = {}
    for row in stats.rows():
        rows.setdefault((row["layer"], row["modality"]), []).append(row["tokens"])
    experts = stats.counts.shape[1]
    names = {"vision": "image", "language": "text"}
    lines = [["layer", "tokens", *(f"expert {expert}" for expert in range(experts))]]
    for (layer, modality), counts in rows.items():
        shares = [f"{count / max(1, sum(counts)):.0%}" if count else "-" for count in counts]
        lines.append([str(layer), names[modality], *shares])
    return table(lines)
