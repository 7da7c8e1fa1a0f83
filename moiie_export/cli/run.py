"""`moiie run`: ask a bundle about pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
    memory_limit_option,
    note,
    table,
)
from moiie_runtime.errors import MoiieError

if TYPE_CHECKING:
    from moiie_runtime import VLM, Generation, Prompt, RoutingStats, Stats

EPILOG = """\b
Examples:
  moiie run moiie-phi3.bundle -i cat.png -p "What is shown in the picture?"
  moiie run moiie-phi3.bundle -i a.png -i b.png -p "Compare the pictures." --json
  moiie run moiie-phi3.bundle -p - < question.txt

The answer is streamed on standard output, everything else goes to standard
error. With --json, --routing, --save-outputs or beams it comes when it is
complete.
"""

_THE_BUNDLES = "  [default: the bundle's]"


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@BUNDLE_ARGUMENT
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A picture; repeat it for several.",
)
@click.option(
    "-p",
    "--prompt",
    required=True,
    metavar="TEXT",
    help="The question; `-` reads standard input. An <image> in it stands for a picture; without one, the "
    "pictures come first.",
)
@click.option("--raw", is_flag=True, help="TEXT is the complete prompt, used as it is.")
@click.option(
    "--instruction",
    metavar="TEXT",
    help="With --raw: the question alone, for bundles that choose experts by it.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Most tokens of the answer." + _THE_BUNDLES
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="T",
    help="Sample, with logits divided by T; 0 samples nothing." + _THE_BUNDLES,
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    metavar="K",
    help="Sample among the K most probable tokens; 0 for all." + _THE_BUNDLES,
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    metavar="P",
    help="Sample among the most probable tokens that together reach P." + _THE_BUNDLES,
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Above 1 makes tokens that were used already less probable." + _THE_BUNDLES,
)
@click.option(
    "--num-beams",
    type=click.IntRange(min=1),
    metavar="N",
    help="Search N answers side by side for the most probable one; 1 takes the most probable token of each step."
    + _THE_BUNDLES,
)
@click.option(
    "--length-penalty",
    type=float,
    metavar="L",
    help="With beams: above 0 favours long answers, below 0 short ones." + _THE_BUNDLES,
)
@click.option("--seed", type=click.IntRange(min=0), metavar="S", help="Makes sampling repeatable.")
@click.option(
    "--stop", "stop_strings", multiple=True, metavar="TEXT", help="End the answer before TEXT; may be repeated."
)
@click.option("--routing", is_flag=True, help="Report which experts the tokens went to.")
@click.option(
    "--save-outputs",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.safetensors",
    help="Write logits (with beams those of the prompt alone) and, with --routing, expert choices.",
)
@click.option("--all-logits", is_flag=True, help="Save the logits of every prompt position, not only of the last.")
@click.option(
    "--target",
    metavar="NAME",
    help="A form that `moiie build` made, or portable for the bundle's own graphs.  [default: cpu if built, else portable]",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads to compute with.  [default: one a core]"
)
@GPU_OPTION
@memory_limit_option(
    "Refuse what is predicted to take more, for example 8GiB; on a GPU without it: more than is free there."
)
@JSON_OPTION
@VERBOSE_OPTION
def command(bundle: Path, **options: Any) -> None:
    """Answer a question about pictures with a bundle."""
    wanted = _checked(options)
    import moiie_runtime

    settings = {name: wanted[name] for name in ("target", "threads", "memory_limit", "gpu")}
    with moiie_runtime.load(bundle, **settings) as vlm:
        prompt = _prepared(vlm, wanted)
        _say_memory(vlm, prompt, wanted)
        if wanted["as_json"] or wanted["routing"] or wanted["save_outputs"]:
            _whole(vlm, prompt, wanted)
        else:
            _streamed(vlm, prompt, wanted)


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the prompt read and everything refused that can be refused before a model is opened."""
    wanted = dict(options)
    if wanted["instruction"] is not None and not wanted["raw"]:
        raise click.UsageError("--instruction goes with --raw; without it the question is known")
    if wanted["all_logits"] and not wanted["save_outputs"]:
        raise click.UsageError("--all-logits goes with --save-outputs")
    target: Path | None = wanted["save_outputs"]
    if target is not None and not target.parent.is_dir():
        raise MoiieError(f"--save-outputs {target}: there is no directory {target.parent}", f"mkdir -p {target.parent}")
    wanted["prompt"] = _prompt(wanted["prompt"], wanted["raw"])
    return wanted


def _prompt(text: str, raw: bool) -> str:
    where = "-p"
    if text == "-":
        where, data = "standard input", sys.stdin.buffer.read()
        text = data.decode("utf-8", "surrogateescape")
        if not raw:
            text = text.removesuffix("\n").removesuffix("\r")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MoiieError(f"{where}: the prompt is not UTF-8 text", "convert it, for example with iconv") from error
    if not text.strip():
        raise MoiieError(f"{where}: the prompt is empty", 'ask something: -p "What is shown in the picture?"')
    return text


def _generation(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given; the bundle has the others."""
    from moiie_runtime.generation_config import SETTINGS

    given = {name: wanted[name] for name in SETTINGS if wanted.get(name) is not None}
    return given | ({"stop_strings": wanted["stop_strings"]} if wanted["stop_strings"] else {})


def _prepared(vlm: VLM, wanted: Mapping[str, Any]) -> Prompt:
    """The prompt with its pictures, made once: for the predicted memory and for the answer."""
    if wanted["raw"]:
        return vlm.processor.from_text(wanted["prompt"], wanted["images"], wanted["instruction"])
    return vlm.processor([{"role": "user", "content": [*wanted["images"], wanted["prompt"]]}])


def _say_memory(vlm: VLM, prompt: Prompt, wanted: Mapping[str, Any]) -> None:
    from moiie_runtime.memory import Request

    settings = vlm.settings(**_generation(wanted))
    request = Request(
        prompt_tokens=prompt.length,
        new_tokens=settings.max_new_tokens,
        images=len(prompt.pictures),
        picture_bytes=sum(picture.nbytes for picture in prompt.pictures),
        all_logits=wanted["all_logits"],
        num_beams=settings.num_beams,
    )
    note(f"predicted memory: {vlm.predicted_memory(request)}")


def _streamed(vlm: VLM, prompt: Prompt, wanted: Mapping[str, Any]) -> None:
    chunks = vlm.stream_prompt(prompt, **_generation(wanted))
    last = None
    try:
        for last in chunks:
            sys.stdout.write(last.text)
            sys.stdout.flush()
    finally:
        if last is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if last is not None:
        _say_stats(last.stats, last.finish_reason)


def _whole(vlm: VLM, prompt: Prompt, wanted: Mapping[str, Any]) -> None:
    from moiie_runtime import Record

    saving = wanted["save_outputs"] is not None
    beams = vlm.settings(**_generation(wanted)).num_beams > 1
    record = Record(
        prefill_logits=("all" if wanted["all_logits"] else "last") if saving else None,
        step_logits=saving and not beams,
        routing=wanted["routing"],
    )
    answer = vlm.generate_prompt(prompt, record=record, **_generation(wanted))
    if saving:
        _save(answer, wanted["save_outputs"])
    stats = answer.routing.stats() if answer.routing is not None else None
    if wanted["as_json"]:
        emit_json(_document(answer, stats))
        return
    click.echo(answer.text)
    _say_stats(answer.stats, answer.finish_reason)
    if stats is not None:
        note("\nshare of each expert, by layer and modality of the token\n" + _routing_table(stats))


def _document(answer: Generation, stats: RoutingStats | None) -> dict[str, Any]:
    document = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "finish_reason": answer.finish_reason,
        "prefill_seconds": answer.prefill_seconds,
        "decode_tokens_per_second": answer.decode_tokens_per_second,
    }
    if answer.instance is not None:
        document["move_weights"] = answer.instance.move_weights.tolist()
        document["mole_index"] = answer.instance.mole_index.tolist()
    return document if stats is None else document | {"routing": stats.rows()}


def _save(answer: Generation, path: Path) -> None:
    """Logits that were recorded, and the experts of prompt positions followed by those of decode steps."""
    import numpy as np

    from moiie_runtime.tensors import save_tensors

    assert answer.prefill_logits is not None
    tensors = {"prefill_logits": answer.prefill_logits}
    if answer.step_logits is not None:
        tensors["step_logits"] = answer.step_logits
    if answer.routing is not None:
        for layer, prefill in answer.routing.prefill.items():
            decode = answer.routing.decode[layer]
            tensors[f"expert_ids.{layer}"] = np.concatenate([prefill.expert_ids, decode.expert_ids])
            tensors[f"expert_weights.{layer}"] = np.concatenate([prefill.expert_weights, decode.expert_weights])
    save_tensors(path, tensors)
    note(f"wrote {path}")


def _say_stats(stats: Stats, reason: str | None) -> None:
    ends = {"stop": "end token", "length": "length limit", "stop_string": "stop string"}
    prompt = f"{stats.prompt_tokens} prompt tokens ({stats.image_tokens} of pictures) in {stats.prefill_seconds:.2f} s"
    speed = f" at {stats.decode_tokens_per_second:.1f} a second" if stats.new_tokens > 1 else ""
    note(f"{prompt}; {stats.new_tokens} new tokens{speed}; ended by {ends.get(reason or '', reason)}")


def _routing_table(stats: RoutingStats) -> str:
    shares: dict[tuple[int, str], list[int]] = {}
    for row in stats.rows():
        shares.setdefault((row["layer"], row["modality"]), []).append(row["tokens"])
    experts = max(len(counts) for counts in shares.values())
    head = ["layer", "tokens", *(f"expert {each}" for each in range(experts))]
    return table([head, *([str(layer), modality, *_percent(counts)] for (layer, modality), counts in shares.items())])


def _percent(counts: Sequence[int]) -> list[str]:
    total = sum(counts)
    return [f"{count / total:.0%}" if count else "-" for count in counts]
