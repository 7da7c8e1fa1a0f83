"""`moiie demo`: a trained model from checkpoint to answers, in one command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note, table
from moiie_export.demo.families import FAMILIES
from moiie_runtime.errors import MoiieError, Unsound

if TYPE_CHECKING:
    from moiie_export.demo.evaluate import Ablation, Accuracy
    from moiie_export.demo.family import DemoFamily
    from moiie_export.demo.shares import Shares
    from moiie_export.demo.show import Answered, Shown
    from moiie_runtime.routing import RoutingStats
    from moiie_runtime.vlm import VLM

EPILOG = """\b
Examples:
  moiie demo
  moiie demo --family mome
  moiie demo --seed 7 -o build/demo
  moiie demo --eval 500
  moiie demo --family mome --eval 500 --ablate --png build/charts
  moiie demo --eval 500 --ablate --json

The models have one or two million parameters and were trained from nothing
on drawn pictures of coloured shapes; see recipes/demo.
"""


@dataclass(frozen=True)
class _Evaluation:
    """What is measured: how many questions, which set of them, whether parts are taken away, where charts go."""

    count: int
    seed: int
    ablate: bool
    charts: Path | None


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.option(
    "--family",
    "name",
    type=click.Choice(FAMILIES),
    default=FAMILIES[0],
    help="Which model: experts by modality, or encoders and adapters by question.",
)
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
@click.option("--ablate", is_flag=True, help="Also accuracy without the picture, or without parts of the model.")
@click.option(
    "--png",
    "charts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="With --eval: draw what each vision expert contributed; needs matplotlib.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which picture, or which held-out questions.")
@JSON_OPTION
@VERBOSE_OPTION
def command(name: str, output: Path, checkpoint: Path | None, as_json: bool, **options: Any) -> None:
    """Export a small trained model, check it, and ask it.

    It draws a picture, answers questions about it and shows where the experts were used.

    With --eval it measures instead: the share of right answers of the PyTorch model and of the bundle, from 0 to 1.
    """
    from moiie_export.cli.progress import Progress
    from moiie_export.cli.sources import checkpoint_directory, need_extra

    need_extra("cpu")
    need_extra("export")
    seed, charts = options["seed"], options["charts"]
    if charts is not None:
        need_extra("report")
    import moiie_runtime
    from moiie_export.demo.families import demo_family
    from moiie_export.demo.shipped import export_demo, shipped_checkpoint

    family = demo_family(name)
    found = shipped_checkpoint(family) if checkpoint is None else checkpoint_directory(checkpoint)
    progress = Progress()
    bundle = export_demo(family, output, found, progress)
    progress.finish()
    with moiie_runtime.load(bundle) as vlm:
        if charts is not None and vlm.bundle.instance_router is None:
            raise MoiieError(
                "--png: this model weighs no vision experts, so there is nothing to draw",
                "leave --png out, or add --family mome",
            )
        if options["count"] or options["ablate"] or charts is not None:
            wanted = _Evaluation(options["count"] or 500, seed, options["ablate"], charts)
            _evaluate(family, vlm, found, wanted, as_json)
        else:
            _show(family, vlm, found, (output, seed), as_json)


def _evaluate(family: DemoFamily, vlm: VLM, checkpoint: Path, wanted: _Evaluation, as_json: bool) -> None:
    from moiie_export.demo.charts import write_shares
    from moiie_export.demo.evaluate import ablations, generations, prompts_of, pytorch_answers, score
    from moiie_export.demo.shares import shares_by_kind
    from moiie_export.model.load import load_model
    from moiie_export.source import ModelSource

    items = family.held_out(wanted.count, wanted.seed)
    with ModelSource.open(checkpoint) as source:
        model = load_model(source, vlm.bundle.dtype)
    note(f"{wanted.count} held-out questions, seed {wanted.seed}")
    answers = generations(family, vlm, items)
    bundle = score(family, items, [each.text for each in answers])
    prompts = prompts_of(family, vlm, items)
    pytorch = score(family, items, pytorch_answers(family, model, vlm, prompts))
    without = ablations(family, model, vlm, items, prompts) if wanted.ablate else []
    shares = shares_by_kind(family, vlm.bundle.encoders, items, answers)
    chart = None if wanted.charts is None else write_shares(wanted.charts, shares)
    if as_json:
        emit_json(_document(wanted, {"pytorch": pytorch, "bundle": bundle}, without, shares))
        return
    rows = [("bundle", bundle), ("PyTorch", pytorch), *((each.name, each.accuracy) for each in without)]
    head = ["", "all", "one thing", *family.kinds]
    click.echo(table([head, *([name, *_percent(accuracy)] for name, accuracy in rows)]))
    if shares:
        click.echo("\nwhat each vision expert contributed, and the adapter that most questions took in each layer")
        click.echo(_shares_table(shares))
    if chart is not None:
        note(f"wrote {chart}")


def _percent(accuracy: Accuracy) -> list[str]:
    shares = [accuracy.overall, accuracy.one_thing, *accuracy.by_kind.values()]
    return [f"{share:.1%}" if share == share else "-" for share in shares]


def _shares_table(shares: dict[str, Shares]) -> str:
    experts = list(next(iter(shares.values())).contributions)
    rows = [["", *experts, "adapters"]]
    for kind, each in shares.items():
        contributions = [f"{value:.0%}" for value in each.contributions.values()]
        rows.append([kind, *contributions, " ".join(map(str, each.adapters))])
    return table(rows)


def _document(
    wanted: _Evaluation, accuracy: dict[str, Accuracy], without: list[Ablation], shares: dict[str, Shares]
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "questions": wanted.count,
        "seed": wanted.seed,
        **{f"{name}_accuracy": each.overall for name, each in accuracy.items()},
        **accuracy,
    }
    if shares:
        document["contributions"] = {kind: each.contributions for kind, each in shares.items()}
        document["move_weights"] = {kind: each.weights for kind, each in shares.items()}
        document["adapters"] = {kind: each.adapters for kind, each in shares.items()}
    return document | ({"ablations": {each.name: each.accuracy for each in without}} if without else {})


def _show(family: DemoFamily, vlm: VLM, checkpoint: Path, wanted: tuple[Path, int], as_json: bool) -> None:
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
    shown = show(family, vlm, output, seed)
    if as_json:
        emit_json({"bundle": bundle, "parity": report.to_dict(), "picture": shown.picture, **_shown(shown)})
        return
    click.echo(f"\n{shown.picture}")
    for each in shown.answers:
        verdict = "" if each.answer == each.expected else f"   (wrong: {each.expected})"
        click.echo(f"  {each.question}\n    {each.answer}{verdict}")
    if shown.routing is not None:
        click.echo("\nwhich experts the tokens went to\n" + _routing_table(shown.routing))
    if shown.answers[0].instance is not None:
        click.echo("\nwhat each question chose: share (weight) of the vision experts, adapter of each layer")
        click.echo(_instance_table(shown.answers))
    routing = " --routing" if shown.routing is not None else ""
    note(f'\nnext: moiie run {bundle} -i {shown.picture} -p "{shown.answers[0].question}"{routing}')


def _shown(shown: Shown) -> dict[str, Any]:
    return {"answers": shown.answers, **({} if shown.routing is None else {"routing": shown.routing.rows()})}


def _instance_table(answers: list[Answered]) -> str:
    rows: list[list[str]] = []
    for each in answers:
        chosen = each.instance or {}
        weights, adapters = chosen["move_weights"], chosen["mole_index"]
        shares = [f"{share:.0%} ({weights[name]:.2f})" for name, share in chosen["contributions"].items()]
        rows = rows or [["", *weights, *(f"layer {layer}" for layer in adapters)]]
        rows.append([each.kind, *shares, *map(str, adapters.values())])
    return table(rows)


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
