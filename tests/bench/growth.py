"""How time grows: decode with the context, prefill with the prompt, decode with the number of experts at fixed top-k."""

from __future__ import annotations

import shutil
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tests.bench.models import SHAPES, SMALL, write_shape
from tests.bench.record import append, environment, show
from tests.bench.rounds import Rounds, interleave, summarise, with_rates
from tests.bench.shapes import METRICS, our_bundle, prepare, specs
from tests.bench.workers import EngineSpec, Worker, usable

CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
EXPERTS = (2, 4, 8, 16)
_NEW = 32
_LAYERS = 4  # of the models with many experts: enough that their weights come from memory, and they fit a disk


def run(options: Namespace) -> None:
    """Both kinds of growth; the peers that can be asked for a context are measured with ours when chosen."""
    result: dict[str, Any] = {}
    if "context" in options.kinds:
        result["context"] = _contexts(options)
    if "experts" in options.kinds:
        result["experts"] = _experts(options)
    settings = {"threads": options.threads, "target": options.target, "quick": options.quick, "new": _NEW}
    append(options.keep, {"benchmark": "growth", "settings": settings, **environment(), **result})


def _contexts(options: Namespace) -> dict[str, Any]:
    """Milliseconds a decode step ends at each context with, and of the prompt that leads there, by engine."""
    shape = (SMALL if options.quick else SHAPES)["moe"]
    folder = options.work / ("small" if options.quick else "full-shapes") / "moe"
    checkpoint = write_shape(shape, folder / "checkpoint")
    chosen = options.engines or ["ours"]
    engines = usable([spec for spec in specs(options) if spec.module in chosen])
    paths = {}
    for spec in engines:
        ours = spec.module == "ours"
        paths[spec.name] = (
            our_bundle(shape, checkpoint, options, max(CONTEXTS)) if ours else prepare(spec, shape, checkpoint, options)
        )
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec, paths[spec.name])) for spec in engines]
        for context in CONTEXTS:
            prompt = context - _NEW
            request = {"prompt_tokens": prompt, "new_tokens": _NEW - 1}
            taken = interleave(workers, request, Rounds(options.rounds, options.most))
            for name, each in with_rates(taken, prompt, _NEW - 1).items():
                found.setdefault(name, {})[str(context)] = {**summarise(each, METRICS), "samples": each}
    for name, each in found.items():
        rows = [[size, _ms(row["decode_rate"]), row["prefill_rate"], row["kept"]] for size, row in each.items()]
        title = f"{name}, moe: growth with the context"
        show(title, ("context", "decode ms", "prefill tok/s", "kept"), rows)
    return found


def _experts(options: Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step by number of experts, two of them per token, samples interleaved."""
    base = replace((SMALL if options.quick else SHAPES)["moe"], layers=_LAYERS)
    folder = options.work / ("small" if options.quick else "full-shapes") / "experts"
    engines: list[tuple[EngineSpec, Any]] = []
    for count in EXPERTS:
        shape = replace(base, experts=count)
        checkpoint = write_shape(shape, folder / str(count) / "checkpoint", "F16")
        bundle = our_bundle(shape, checkpoint, options, max_context=512)
        shutil.rmtree(checkpoint)  # the bundle is what is measured
        chosen = {"threads": options.threads, "target": options.target}
        engines.append((EngineSpec(str(count), "ours", options=chosen), bundle))
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec, bundle)) for spec, bundle in engines]
        request = {"prompt_tokens": 128, "new_tokens": 64}
        taken = interleave(workers, request, Rounds(options.rounds, options.most))
    samples = with_rates(taken, 128, 64)
    found = {name: {**summarise(each, METRICS), "samples": each} for name, each in samples.items()}
    first = found[str(EXPERTS[0])]["decode_rate"]
    rows = [
        [
            name,
            _ms(row["decode_rate"]),
            first / row["decode_rate"] if first and row["decode_rate"] else None,
            row["kept"],
        ]
        for name, row in found.items()
    ]
    title = f"moe, {_LAYERS} layers: decode by number of experts, top-2"
    show(title, ("experts", "decode ms", "times the first", "kept"), rows)
    return found


def _ms(rate: float | None) -> float | None:
    return 1000 / rate if rate else None
