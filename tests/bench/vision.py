"""The vision tower of full size (SigLIP-so400m) in float32 and in int8, as built for the CPU: seconds for one picture.

The decoder behind it has one narrow layer, which hardly counts: a sample is a prefill of one picture and one token.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from tests.bench.full import TOWER
from tests.bench.models import PORTABLE, build, export, folder_bytes, write_recipe
from tests.bench.record import append, environment, show
from tests.bench.rounds import Rounds, interleave, ratio, summarise
from tests.bench.workers import EngineSpec, Worker

_RULES: dict[str, list[dict[str, Any]]] = {
    "float32": [],
    "int8": [
        {"match": "vision_encoder.tower.*.mlp.fc2.weight", "format": "float32"},  # rows of 4304: no group divides them
        {"match": "vision_tower", "format": "int8", "group_size": 32, "method": "rtn"},
    ],
}


def run(options: Namespace) -> None:
    """Measure both, print the table, append the result."""
    from tests.synthetic import write_checkpoint

    folder = options.work / ("small" if options.quick else "full-shapes") / "vision"
    tower = (64, 128, 2, 4, 28, 14) if options.quick else TOWER
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "generation_config.json").is_file():  # what is written last
        narrow = {"hidden": 256, "intermediate": 512, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 1024}
        write_checkpoint(checkpoint, **narrow, backbone="llama", variant="dense", tower=tower, dtype="F16")
    bundles = {}
    for name, rules in _RULES.items():
        recipe = {"schema": 1, "extends": "default", "description": "for a benchmark"}
        recipe |= {"export": {"dtype": "float32"}, "quantization": {"rules": rules}}
        bundles[name] = export(checkpoint, folder / f"{name}.bundle", write_recipe(folder / f"{name}.yaml", recipe))
        if options.target != PORTABLE:
            build(bundles[name], options.target)
    chosen = {"threads": options.threads, "target": options.target}
    with ExitStack() as stack:
        specs = [EngineSpec(name, "ours", options=chosen) for name in bundles]
        workers = [stack.enter_context(Worker(spec, bundles[spec.name])) for spec in specs]
        request = {"prompt_tokens": 1, "new_tokens": 0, "images": 1}
        taken = interleave(workers, request, Rounds(options.rounds, options.most))
    found = {
        name: {**summarise(samples, ("prefill_seconds",)), "samples": samples, "files": folder_bytes(bundles[name])}
        for name, samples in taken.items()
    }
    gain = ratio(taken["float32"], taken["int8"], "prefill_seconds")
    rows = [[name, each["prefill_seconds"], each["kept"]] for name, each in found.items()]
    show("vision tower: one picture", ("weights", "seconds", "kept"), [*rows, ["float32 / int8", gain["paired"], None]])
    settings = {"threads": options.threads, "target": options.target, "quick": options.quick}
    append(options.keep, {"benchmark": "vision", "settings": settings, **environment(), "gain": gain, "rows": found})
