"""`moiie inspect`: what a bundle holds, without loading it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiie_export.cli.common import (
    BUNDLE_ARGUMENT,
    CONTEXT,
    JSON_OPTION,
    VERBOSE_OPTION,
    emit_json,
    note,
    table,
)
from moiie_runtime.errors import Unsound
from moiie_runtime.sizes import readable

if TYPE_CHECKING:
    from moiie_runtime.bundle import Bundle

EPILOG = """\b
Examples:
  moiie inspect moiie-phi3.bundle
  moiie inspect moiie-phi3.bundle --verify
  moiie inspect moiie-phi3.bundle --json
"""

_PATTERNS = 4


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@BUNDLE_ARGUMENT
@click.option(
    "--verify",
    is_flag=True,
    help="Read every file, those of built engines too, and compare its SHA-256; exits 3 when one differs.",
)
@JSON_OPTION
@VERBOSE_OPTION
def command(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show a bundle's model, graphs, weights, proof and built engines. Needs no backend."""
    from moiie_export.cli.engines import check_engines, engine_lines, engine_summary
    from moiie_export.cli.quantization import quantization_lines
    from moiie_export.cli.weights import weight_summary
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.engine_files import engine_files

    opened = Bundle.open(bundle)
    problems = opened.verify() if verify else []
    if problems and not as_json:
        raise _damaged(bundle, problems)
    document = summary(opened)
    if not problems:
        document["weights"] = weight_summary(opened)
    engines = engine_files(opened, read=verify)
    document["engines"] = engine_summary(engines)
    if as_json:
        sound = not problems and not any(each.problems or each.stale for each in engines)
        emit_json(document | {"verified": verify and sound, "problems": problems})
        if problems:
            raise _damaged(bundle, problems)
    if verify:
        check_engines(engines)
    if as_json:
        return
    lines = list(_lines(document))
    if document["quantization"] is not None:
        lines += quantization_lines(document["quantization"], _min_tokens(opened.raw))
    lines += engine_lines(engines, opened)
    click.echo("\n".join(lines))
    if verify:
        note(f"all {len(opened.files)} files are as bundle.json says")
        for each in engines:
            note(f"all {len(each.files)} files of engines/{each.target} are as engine.json says")


def summary(bundle: Bundle) -> dict[str, Any]:
    """What `bundle.json` says, less the long lists: completeness is counted, unreachable tensors are kept."""
    from moiie_export.cli.quantization import quantization_summary

    raw = bundle.raw
    completeness = _map(raw.get("completeness"))
    unreachable, used = _map(completeness.get("unreachable")), _map(completeness.get("tensors"))
    kept = ("schema", "name", "created_by", "source", "dtype", "model", "tokens", "processor", "generation", "kv_cache")
    document = {name: raw.get(name) for name in kept}
    document["components"] = {
        name: raw["components"][name] for name in (*bundle.phases, *bundle.components) if name in bundle.components
    }
    document["residency"] = {
        phase: {"tensors": len(each.weights), "bytes": each.bytes} for phase, each in bundle.residency.items()
    }
    document["completeness"] = {
        "checkpoint_tensors": len(used) + len(unreachable),
        "used": len(used),
        "unreachable": unreachable,
    }
    document["quantized"] = len(bundle.quantization)
    document["quantization"] = quantization_summary(raw)
    document["files"] = {name: record.bytes for name, record in sorted(bundle.files.items())}
    return document


def _min_tokens(raw: Mapping[str, Any]) -> int:
    """The recipe's `quantization.min_tokens`; 0 where it is not recorded."""
    least = _map(_map(raw.get("recipe")).get("quantization")).get("min_tokens")
    return least if isinstance(least, int) else 0


def _map(value: Any) -> Mapping[str, Any]:
    """`value` when it is a map; the keys that a run does not use are not checked on opening."""
    return value if isinstance(value, Mapping) else {}


def _damaged(bundle: Path, problems: list[str]) -> Unsound:
    count = "1 file is" if len(problems) == 1 else f"{len(problems)} files are"
    return Unsound(
        f"{bundle}: {count} not as bundle.json says\n" + "\n".join(f"  {problem}" for problem in problems),
        "copy the bundle again, or write it again with `moiie export`",
    )


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield table(list(_head(document)))
    for name, component in document["components"].items():
        yield f"\n{name}: {component['file']}"
        rows = [["in", *_io(each)] for each in component["inputs"]] + [
            ["out", *_io(each)] for each in component["outputs"]
        ]
        yield table(_folded(rows), "  ")
        counts = sorted(_map(component.get("op_counts")).items(), key=lambda item: (-item[1], item[0]))
        yield _filled([f"{op} {count}" for op, count in counts] or ["not recorded"])
    weights = document["weights"]
    yield f"\nweights: {weights['tensors']} tensors, {readable(weights['bytes'])}, each stored once"
    groups = {f"as {name}": each for name, each in weights["by_dtype"].items()}
    groups |= {f"for {name}": each for name, each in weights["by_component"].items()}
    yield table([[name, f"{each['tensors']} tensors", readable(each["bytes"])] for name, each in groups.items()], "  ")
    if document["quantized"]:
        yield "\nby bank:"
        yield table(list(_banks(weights["by_bank"])), "  ")
    yield from _completeness(document["completeness"])


def _banks(banks: Mapping[str, Any]) -> Iterator[list[str]]:
    for bank, forms in banks.items():
        for form, each in forms.items():
            yield [bank, form, f"{each['parameters']} weights", readable(each["bytes"])]


def _head(document: Mapping[str, Any]) -> Iterator[list[str]]:
    made = _map(document["created_by"])
    model, cache = document["model"], document["kv_cache"]
    yield ["bundle", f"{document['name']} (schema {document['schema']}, {made.get('tool')} {made.get('version')})"]
    source = _map(document["source"])
    files = _map(source.get("files"))
    yield ["source", f"{source.get('checkpoint')} ({len(files)} files, SHA-256 recorded)" if files else "not recorded"]
    shape = f"{model['num_hidden_layers']} layers, hidden {model['hidden_size']}, {model['num_attention_heads']} heads"
    heads = f"{model['num_key_value_heads']} KV heads of {model['head_dim']}"
    yield ["model", f"{model['model_type']}: {shape} ({heads}), vocabulary {model['vocab_size']}"]
    moe = model["moe"]
    if moe is None:
        yield ["experts", "none (dense)"]
    else:
        groups = "; ".join(f"{name}: {_words(ids)}" for name, ids in moe["expert_groups"].items())
        yield ["experts", f"{moe['num_experts']}, top {moe['top_k']}, in layers {_words(moe['layers'])} ({groups})"]
    per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"] * 4
    size = readable(per_token * cache["capacity"])
    yield ["context", f"{cache['capacity']} tokens (KV cache {cache['layout']} {cache['dtype']}, {size} a sequence)"]
    quantized = f", {document['quantized']} tensors quantised" if document["quantized"] else ""
    yield ["weights", f"stored as {document['dtype']}{quantized}"]


def _filled(items: list[str]) -> str:
    """Items separated by commas, broken into lines between items only."""
    solid = ", ".join(item.replace(" ", "\N{NO-BREAK SPACE}") for item in items)
    filled = textwrap.fill(f"ops  {solid}", 110, initial_indent="  ", subsequent_indent=" " * 7, break_on_hyphens=False)
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def _io(tensor: Mapping[str, Any]) -> list[str]:
    return [tensor["name"], tensor["dtype"], f"[{_words(tensor['shape'], ', ')}]"]


def _folded(rows: list[list[str]]) -> list[list[str]]:
    """Rows that differ only in one number of their name (a layer's) become one, with the numbers as a list."""
    folded: dict[tuple[str, ...], list[str]] = {}
    for direction, name, dtype, shape in rows:
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        pattern = ".".join("%d" if part.isdigit() else part for part in parts)
        folded.setdefault((direction, pattern, dtype, shape), []).extend(numbers)
    lines = []
    for (direction, pattern, dtype, shape), numbers in folded.items():
        name = pattern.replace("%d", numbers[0] if len(numbers) == 1 else "{" + _ranges(numbers) + "}")
        lines.append([direction, name, dtype, shape])
    return lines


def _ranges(numbers: list[str]) -> str:
    values = [int(each) for each in numbers]
    consecutive = len(values) > 2 and values == list(range(values[0], values[-1] + 1))
    return f"{values[0]}..{values[-1]}" if consecutive else ",".join(numbers)


def _completeness(completeness: Mapping[str, Any]) -> Iterator[str]:
    total, used, unreachable = (completeness[each] for each in ("checkpoint_tensors", "used", "unreachable"))
    if not total:
        yield "\ncompleteness: not recorded"
        return
    yield f"\ncompleteness: {total} tensors in the checkpoint: {used} used, {len(unreachable)} unreachable"
    reasons: dict[str, list[str]] = {}
    for name, reason in unreachable.items():
        reasons.setdefault(str(reason), []).append(name)
    for reason, names in reasons.items():
        patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        shown = patterns if len(patterns) <= _PATTERNS else patterns[: _PATTERNS - 1]
        yield f"  {len(names)}: {reason}"
        yield "\n".join(f"    {pattern}" for pattern in shown)
        if len(shown) < len(patterns):
            yield f"    and {len(patterns) - len(shown)} more such names; --json lists every tensor"


def _words(values: Any, separator: str = " ") -> str:
    return separator.join(str(each) for each in values)
