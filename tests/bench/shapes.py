"""Prefill and decode of the shapes `dense` and `moe`, beside llama.cpp, onnxruntime-genai and PyTorch eager."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.bytes_touched import bundle_bytes
from tests.bench.models import (
    PORTABLE,
    SHAPES,
    SMALL,
    Precision,
    Shape,
    build,
    decoder_banks,
    export,
    folder_bytes,
    write_recipe,
    write_shape,
)
from tests.bench.record import append, environment, show
from tests.bench.rounds import Rounds, interleave, ratio, summarise, with_rates
from tests.bench.workers import EngineSpec, Worker, usable

PROMPT, NEW = 256, 64
METRICS = ("prefill_rate", "decode_rate")
GOALS = {
    ("moe", "llama.cpp Q4_0", "decode_rate"): 1.15,
    ("dense", "llama.cpp Q4_0", "decode_rate"): 1.05,
    ("moe", "llama.cpp Q4_0", "prefill_rate"): 1.25,
    ("moe", "PyTorch bfloat16", "prefill_rate"): 0.65,
    ("dense", "PyTorch bfloat16", "prefill_rate"): 0.65,
}
"""(shape, peer, metric) -> how many times the peer's rate ours should be."""


def specs(options: Namespace) -> list[EngineSpec]:
    """All engines; ours first, and how fast memory can be read last."""
    threads, python = options.threads, options.peers_python
    llama = {"llama_bench": options.llama_bench, "threads": threads}
    return [
        EngineSpec("moiie", "ours", options={"threads": threads, "target": options.target}),
        EngineSpec("llama.cpp Q4_0", "llama_cpp", python, llama),
        EngineSpec("onnxruntime-genai", "genai", python, {"threads": threads}),
        EngineSpec("PyTorch float32", "torch_eager", python, {"threads": threads, "dtype": "float32"}),
        EngineSpec("PyTorch bfloat16", "torch_eager", python, {"threads": threads, "dtype": "bfloat16"}),
        EngineSpec("bandwidth", "bandwidth", options={"threads": threads}),
    ]


def run(options: Namespace) -> None:
    """Measure the chosen shapes one after another, each with all engines that can run here."""
    wanted = [spec for spec in specs(options) if options.engines is None or spec.module in options.engines]
    engines = usable(wanted)
    for name in options.shapes:
        shape = (SMALL if options.quick else SHAPES)[name]
        folder = options.work / ("small" if options.quick else "full-shapes") / name
        checkpoint = write_shape(shape, folder / "checkpoint")
        paths = {spec.name: prepare(spec, shape, checkpoint, options) for spec in engines}
        result = _measure(engines, paths, options)
        _report(name, result, options)


def prepare(spec: EngineSpec, shape: Shape, checkpoint: Path, options: Namespace) -> Path:
    """The engine's own form of a checkpoint."""
    if spec.module == "ours":
        return our_bundle(shape, checkpoint, options, max_context=1024)
    if spec.module == "bandwidth":
        return checkpoint
    return Path(spec.call("prepare", checkpoint=checkpoint, folder=checkpoint.parent)["path"])


def our_bundle(shape: Shape, checkpoint: Path, options: Namespace, max_context: int) -> Path:
    """The bundle in int4, built for the target when one is named."""
    precision = Precision(options.format, options.group_size)
    folder = checkpoint.parent
    made = precision.recipe(decoder_banks(shape), max_context)
    recipe = write_recipe(folder / f"{precision.name}-{max_context}.yaml", made)
    bundle = export(checkpoint, folder / f"{precision.name}-{max_context}.bundle", recipe)
    if options.target != PORTABLE:
        build(bundle, options.target)
    return bundle


def _measure(engines: list[EngineSpec], paths: dict[str, Path], options: Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec, paths[spec.name])) for spec in engines]
        request = {"prompt_tokens": PROMPT, "new_tokens": NEW}
        taken = interleave(workers, request, Rounds(options.rounds, options.most))
        memory = {worker.name: worker.ask({"do": "memory"}) for worker in workers}
        about = {worker.name: worker.about for worker in workers}
    samples = with_rates(taken, PROMPT, NEW)
    metrics = dict.fromkeys(samples, METRICS) | {"bandwidth": ("bytes_per_second",)}
    return {
        "engines": {
            name: {**summarise(each, metrics[name]), "about": about[name], "memory": memory[name]}
            for name, each in samples.items()
        },
        "samples": samples,
        "ratios": {
            other: {metric: ratio(samples["moiie"], each, metric) for metric in METRICS}
            for other, each in samples.items()
            if "moiie" in samples and other not in ("moiie", "bandwidth")
        },
        **({"bundle": _about_bundle(paths["moiie"], options.target)} if "moiie" in paths else {}),
    }


def _about_bundle(bundle: Path, target: str) -> dict[str, Any]:
    touched = bundle_bytes(bundle, target)
    context = PROMPT + NEW / 2
    files = {name: size for name, size in folder_bytes(bundle).items() if size > 1 << 20}
    return {"bytes_per_decode_token": touched.at(context), "context": context, "large_files": files}


def _report(name: str, result: dict[str, Any], options: Namespace) -> None:
    engines = result["engines"]
    rows = [  # llama-bench is a process of its own for each sample: the memory of the one that starts it says nothing
        [
            engine,
            row["prefill_rate"],
            row["decode_rate"],
            None if engine.startswith("llama.cpp") else (row["memory"]["anon"] + row["memory"]["file"]) / 1e6,
            row["kept"],
        ]
        for engine, row in engines.items()
        if engine != "bandwidth"
    ]
    title = f"{name}: prefill {PROMPT} and decode {NEW}, tokens a second (median of quiet samples)"
    show(title, ("engine", "prefill", "decode", "RSS MB", "kept"), rows)
    compared = []
    for other, metrics in result["ratios"].items():
        for metric, found in metrics.items():
            goal = GOALS.get((name, other, metric))
            compared.append([f"{metric.removesuffix('_rate')} / {other}", found["paired"], found["of_medians"], goal])
    show("ratios", ("moiie to", "paired", "of medians", "goal"), compared)
    read = engines.get("bandwidth", {}).get("bytes_per_second")
    rate = engines.get("moiie", {}).get("decode_rate")
    if read and rate:
        share = rate * result["bundle"]["bytes_per_decode_token"] / read
        result["share_of_bandwidth"] = share
        print(f"  memory is read at {read / 1e9:.1f} GB/s; decode reaches {share:.0%} of what that allows")
    settings = {"prompt": PROMPT, "new": NEW, "threads": options.threads, "target": options.target}
    settings |= {"format": options.format, "group_size": options.group_size, "quick": options.quick}
    append(options.keep, {"benchmark": "shapes", "shape": name, "settings": settings, **environment(), **result})
