"""What routing once a request buys a MoME, in one run (see README.md).

usage: python tests/bench/bench.py mome [--samples N] [--keep FILE]
"""

from __future__ import annotations

import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import moiie_runtime
from moiie_export.model.layers import Adapter
from moiie_export.model.load import load_model
from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_export.recipe import load_recipe
from moiie_export.source import ModelSource
from tests.bench.quiet import foreign_share, is_quiet, usage
from tests.bench.record import ROOT, append, environment
from tests.synthetic_mome import SIZES, write_mome_checkpoint

QUESTIONS = ("What is written on the sign?", "How many people wait beside it?")
DECODE_STEPS = 24


def prepare() -> tuple[Path, Path]:
    """A checkpoint and its bundle, kept in build/bench for the next run."""
    folder = ROOT / "build" / "bench" / "mome"
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if not (checkpoint / "config.json").is_file():
        write_mome_checkpoint(checkpoint, SIZES)
    recipe = load_recipe("default")
    export_bundle(ExportRequest(checkpoint, bundle, replace(recipe, export=replace(recipe.export, max_context=640))))
    return checkpoint, bundle


def sample(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds that a call took, and the share of the machine that other processes used meanwhile."""
    before, start = usage(os.getpid()), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "foreign": foreign_share(before, usage(os.getpid()), os.cpu_count() or 1)}


def measure(cases: dict[str, Callable[[], Any]], count: int) -> dict[str, Any]:
    """Alternate the cases; medians of quiet samples, of all where too few are quiet."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for round_ in range(count + 1):
        for name, work in cases.items():
            found = sample(work)
            samples[name] += [found] if round_ else []  # the first one warms up
    result = {}
    for name, taken in samples.items():
        quiet = [each for each in taken if is_quiet(each)]
        enough = len(quiet) >= max(3, len(taken) // 2)
        seconds = statistics.median(each["seconds"] for each in (quiet if enough else taken))
        result[name] = {"seconds": seconds, "quiet": enough, "samples": taken}
    return result


def first_tokens(bundle: Path) -> dict[str, Callable[[], Any]]:
    """Time to the first token: a new picture, the same picture again, and the same without a cache."""
    cached, plain = (moiie_runtime.load(bundle, feature_cache=budget) for budget in ("64MiB", 0))
    random = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (240, 320, 3), np.uint8))

    same = picture()

    def ask(vlm: moiie_runtime.VLM, image: Image.Image, question: str) -> None:
        content = [image, question]
        vlm.generate([{"role": "user", "content": content}], max_new_tokens=1, num_beams=1, repetition_penalty=1.0)

    ask(cached, same, QUESTIONS[0])
    return {
        "first question on a picture": lambda: ask(cached, picture(), QUESTIONS[0]),
        "second question on it": lambda: ask(cached, same, QUESTIONS[1]),
        "second question, no cache": lambda: ask(plain, same, QUESTIONS[1]),
    }


@torch.inference_mode()
def decode_steps(checkpoint: Path) -> dict[str, Callable[[], Any]]:
    """Decode steps of the PyTorch model: no adapter, the chosen one, and all of them times a one-hot, as published."""
    with ModelSource.open(checkpoint) as source:
        model = load_model(source)
    text = model.config.text
    embeds, lengths = torch.randn(1, 1, text.hidden_size), torch.tensor([300])
    index = torch.zeros(1, len(model.config.mole.layers), dtype=torch.int32)
    one = model.mole.choose(index)
    banks = [model.mole.choose(index + k) for k in range(model.config.mole.num_experts)]
    cache = model.new_cache(1, 640)

    def steps(adapters: list[Adapter | None] | None, others: list[list[Adapter | None]]) -> None:
        with torch.inference_mode():
            for _ in range(DECODE_STEPS):
                model.decoder(embeds, None, lengths, None, cache, adapters)
                for bank in others:  # what the published forward computes besides and multiplies by zero
                    for adapter in bank:
                        if adapter is not None:
                            torch.ops.moiie.adapter_dispatch(embeds, *adapter)

    return {
        "decode, no adapter": lambda: steps(None, []),
        "decode, one adapter": lambda: steps(one, []),
        "decode, all adapters": lambda: steps(one, banks[1:]),
    }


def run(options: Namespace) -> None:
    """Run everything, print a table, append the result."""
    checkpoint, bundle = prepare()
    found = measure(first_tokens(bundle), options.samples) | measure(decode_steps(checkpoint), options.samples)
    for name, row in found.items():
        noisy = "" if row["quiet"] else "  (noisy: other processes took part of the CPU)"
        print(f"{name:30}{row['seconds'] * 1000:10.1f} ms{noisy}")
    for above, below in (
        ("second question on it", "first question on a picture"),
        ("second question, no cache", "second question on it"),
        ("decode, one adapter", "decode, no adapter"),
        ("decode, all adapters", "decode, one adapter"),
    ):
        print(f"{above} / {below}: {found[above]['seconds'] / found[below]['seconds']:.2f}")
    append(options.keep, {"benchmark": "mome", **environment(), "results": found})
