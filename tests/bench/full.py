"""A model of full size: exported to int4, built and run. Each step keeps what it found, so that they can be run apart."""

from __future__ import annotations

import json
import shutil
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.bytes_touched import bundle_bytes
from tests.bench.jobs import forget_pages, run_job
from tests.bench.models import PORTABLE, folder_bytes, moiie, write_recipe
from tests.bench.record import append, environment, show
from tests.bench.rounds import Rounds, interleave, summarise, with_rates
from tests.bench.workers import EngineSpec, Worker

STEPS = ("write", "export", "compare", "build", "run")
TOWER = (1152, 4304, 27, 16, 384, 14)
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {
        "backbone": "phi3",
        "hidden": 3072,
        "intermediate": 8192,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "vocab": 32064,
    },
    "llama3": {
        "backbone": "llama",
        "hidden": 4096,
        "intermediate": 14336,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "vocab": 128256,
    },
}
"""MoIIE-Phi-3 (7.9 B parameters) and MoIIE-LLaMA-3 (16.9 B), both with SigLIP-so400m."""
_TEXT, _NEW = 64, 64
_PAGES_SLACK = 300e6  # of the goal for memory after prefill


def run(options: Namespace) -> None:
    """Do the chosen steps, print what is known, and append the result after the last one."""
    name = f"{options.model}-1of{options.part}" if options.part > 1 else options.model
    folder = options.work / "full" / ("quick" if options.quick else name)
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    found: dict[str, Any] = json.loads(state.read_text()) if state.is_file() else {}
    for step in STEPS:
        if step in options.steps and (step != "build" or options.target != PORTABLE):
            print(f"{step} ...", file=sys.stderr, flush=True)
            found[step] = _STEPS[step](folder, options)
            if step == "compare" and options.pairs > 1:
                found |= _pairs(folder, options, found)
            if step == "compare" and options.delete:
                shutil.rmtree(folder / "checkpoint")
            state.write_text(json.dumps(found, indent=1) + "\n")
    _report(name, found, options)
    if "run" in options.steps:
        settings = {"model": options.model, "part": options.part, "threads": options.threads}
        settings |= {"target": options.target, "text_tokens": _TEXT, "new_tokens": _NEW, "quick": options.quick}
        append(options.keep, {"benchmark": "full-size", "settings": settings, **environment(), **found})
    if options.delete and "run" in options.steps:
        shutil.rmtree(folder)


def sizes(options: Namespace) -> dict[str, Any]:
    """Arguments of `write_checkpoint`."""
    model = dict(MODELS[options.model])
    layers, tower = model["layers"], TOWER
    if options.quick:
        model |= {"hidden": 256, "intermediate": 512, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 1024}
        return {**model, "variant": "moiie", "tower": (64, 128, 3, 4, 56, 14), "shard_bytes": 8 << 20}
    model["layers"] = max(2, layers // options.part)
    tower = (*tower[:2], max(2, tower[2] // options.part), *tower[3:])
    return {**model, "variant": "moiie", "tower": tower}


def _write(folder: Path, options: Namespace) -> dict[str, Any]:
    from tests.synthetic import write_checkpoint

    started = time.monotonic()
    checkpoint = write_checkpoint(folder / "checkpoint", **sizes(options), unfreeze=True, dtype="BF16")
    files = folder_bytes(checkpoint)
    return {"seconds": time.monotonic() - started, "bytes": sum(files.values()), "files": len(files)}


def _export(folder: Path, options: Namespace) -> dict[str, Any]:
    bundle = folder / "model.bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    recipe = options.recipe or write_recipe(folder / "int4.yaml", full_recipe(options))
    forget_pages((folder / "checkpoint").glob("*.safetensors"))
    command = moiie("export", recipe, "--checkpoint", folder / "checkpoint", "-o", bundle)
    found = run_job(command)
    del found["stdout"]
    return {**found, "files": folder_bytes(bundle)}


def full_recipe(options: Namespace) -> dict[str, Any]:
    """The decoder's matrices in int4, the embedding table in float16, all else in float32."""
    rule = {"format": options.format, "group_size": options.group_size, "method": "rtn"}
    rules = [
        {"match": ["attention", "experts", "dense", "lm_head"], **rule},
        {"match": "embed_tokens", "format": "float16"},
    ]
    return {"schema": 1, "extends": "default", "description": "for a benchmark", "quantization": {"rules": rules}}


def _pairs(folder: Path, options: Namespace, first: dict[str, Any]) -> dict[str, Any]:
    """The export and what it is compared with once more in turn: of each the run of median length, and all the lengths.

    Memory is the most of all runs.
    """
    taken = {name: [first[name]] for name in ("export", "compare")}
    for _ in range(options.pairs - 1):
        taken["export"].append(_export(folder, options))
        taken["compare"].append(_compare(folder, options))
    found = {}
    for name, runs in taken.items():
        ordered = sorted(runs, key=lambda each: each["seconds"])
        lengths = [{"seconds": each["seconds"], "foreign": each["foreign"]} for each in runs]
        peak = {"peak_anon": max(each["peak_anon"] for each in runs)}
        found[name] = {**ordered[(len(runs) - 1) // 2], **peak, "runs": lengths}
    return found


def _compare(folder: Path, options: Namespace) -> dict[str, Any]:
    """Copying and rounding."""
    forget_pages((folder / "checkpoint").glob("*.safetensors"))
    module = [sys.executable, "-m", "tests.bench.full_compare"]
    places = [folder / "checkpoint", folder / "model.bundle", folder]
    found = run_job([*module, *map(str, places), str(options.threads)])
    apart = json.loads(found.pop("stdout"))
    return {**found, **apart}


def _build(folder: Path, options: Namespace) -> dict[str, Any]:
    bundle = folder / "model.bundle"
    found = run_job(moiie("build", bundle, "--target", options.target, "--force"))
    del found["stdout"]
    return {**found, "files": folder_bytes(bundle / "engines" / options.target)}


def _run(folder: Path, options: Namespace) -> dict[str, Any]:
    bundle = folder / "model.bundle"
    ours = EngineSpec("moiie", "ours", options={"threads": options.threads, "target": options.target})
    read = EngineSpec("bandwidth", "bandwidth", options={"threads": options.threads})
    request = {"prompt_tokens": _TEXT, "new_tokens": _NEW, "images": 1}
    with Worker(ours, bundle) as worker:
        memory = worker.ask({"do": "watched", **request})
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec, bundle)) for spec in (ours, read)]
        taken = interleave(workers, request, Rounds(options.rounds, options.most))
    manifest = json.loads((bundle / "bundle.json").read_text())
    prompt = manifest["tokens"]["image_tokens"] + _TEXT
    samples = with_rates(taken, prompt, _NEW)
    touched, context = bundle_bytes(bundle, options.target), prompt + _NEW / 2
    speed = summarise(samples["moiie"], ("prefill_seconds", "prefill_rate", "decode_rate"))
    bandwidth = summarise(samples["bandwidth"], ("bytes_per_second",))
    known = speed["decode_rate"] and bandwidth["bytes_per_second"]
    return {
        "prompt_tokens": prompt,
        "speed": speed,
        "bandwidth": bandwidth,
        "bytes_per_decode_token": touched.at(context),
        "share_of_bandwidth": known and speed["decode_rate"] * touched.at(context) / bandwidth["bytes_per_second"],
        "memory": memory,
        "language_weights": touched.resident,
        "kv_bytes": touched.kv_per_position * (prompt + _NEW),
        "samples": samples,
    }


_STEPS = {"write": _write, "export": _export, "compare": _compare, "build": _build, "run": _run}


def _report(name: str, found: dict[str, Any], options: Namespace) -> None:
    rows: list[list[Any]] = []
    if export := found.get("export"):
        rows += [
            ["export seconds", export["seconds"], None],
            ["export peak RssAnon GB", export["peak_anon"] / 1e9, 2.0],
        ]
        rows += [["bundle GB", sum(export["files"].values()) / 1e9, None]]
        if compare := found.get("compare"):
            beside = compare["copy_seconds"] + compare["round_seconds"]
            rows += [["copy + rounding seconds", beside, None], ["export / that", export["seconds"] / beside, 1.3]]
    if build := found.get("build"):
        rows += [["build seconds", build["seconds"], None], ["build peak RssAnon GB", build["peak_anon"] / 1e9, None]]
        rows += [["built GB", sum(build["files"].values()) / 1e9, None]]
    if run_ := found.get("run"):
        rows += _run_rows(run_)
    show(f"{name}: export and run", ("what", "found", "goal"), rows)


def _run_rows(run_: dict[str, Any]) -> list[list[Any]]:
    speed, memory = run_["speed"], run_["memory"]
    during, after = memory["during_prefill"], memory["after_prefill"]
    limit = run_["language_weights"] + run_["kv_bytes"] + _PAGES_SLACK
    rows = [
        ["load seconds", memory["load"], None],
        [f"prefill of {run_['prompt_tokens']}: seconds", speed["prefill_seconds"], None],
        ["decode tokens a second", speed["decode_rate"], None],
        ["MB a decode token reads", run_["bytes_per_decode_token"] / 1e6, None],
        ["bandwidth GB/s", (run_["bandwidth"]["bytes_per_second"] or 0) / 1e9, None],
        ["share of that bound", run_["share_of_bandwidth"], 0.7],
        ["quiet samples", f"{speed['kept']} of {speed['taken']}", None],
    ]
    for title, at in (("during prefill", during), ("after prefill", after)):
        rows += [[f"{title}: RssAnon, RssFile MB", f"{at['anon'] / 1e6:.0f}, {at['file'] / 1e6:.0f}", None]]
    return [*rows, ["after prefill: resident MB", (after["anon"] + after["file"]) / 1e6, limit / 1e6]]
