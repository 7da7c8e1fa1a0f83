"""Lowers and builds graphs in this one process, for three GPUs together; prints a line of JSON a graph.

    python rtx_process.py OUT PLUGINS FOLDER...

FOLDER is a bundle, or has graphs of a MoIIE in onnx/ whose two layers have experts. One step is also built without plugins, as
`dense`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import onnx_ir as ir

from moiie_export.builders.compile_engine import EngineJob, compile_engine
from moiie_export.builders.engine_specs import Profile, engine_specs
from moiie_export.builders.library import load_library, load_plugins
from moiie_export.builders.plan_file import (
    accelerators,
    causal_masks,
    plan_text,
    profile_bounds,
    read_header,
    work_memory,
)
from moiie_export.graph.trt import lower
from moiie_export.graph.trt_context import TrtContext
from moiie_runtime.bundle import Bundle
from tests.trt_graphs import target

SMS, BUCKETS = (86, 89, 120), (64, 1024)
DENSE = ("phi3", "decoder_decode")
PROFILES = {
    "decoder_prefill": (
        Profile("prefill_64", {"sequence": (1, 64, 64)}),
        Profile("prefill_1024", {"sequence": (65, 1024, 1024)}),
    ),
    "vision_encoder": (Profile("images", {"images": (1, 1, 4)}),),
}
"""Of graphs without a bundle; the decode step has no open dimension."""


def _profiles(folder: Path, name: str, wanted: Any) -> tuple[Profile, ...]:
    if (folder / "bundle.json").is_file():
        return next(each.profiles for each in engine_specs(Bundle.open(folder), wanted) if each.component == name)
    return PROFILES.get(name, ())


def main(out: Path, plugins: Path, folders: list[Path]) -> None:
    library = load_library("tensorrt_rtx")
    load_plugins(library, plugins)
    for folder in folders:
        jobs = [(graph, "required") for graph in sorted((folder / "onnx").glob("*.onnx"))]
        if folder.name == DENSE[0]:
            jobs.append((folder / "onnx" / f"{DENSE[1]}.onnx", "off"))
        for graph, used in jobs:
            start, library_file = time.monotonic(), plugins if used == "required" else None
            wanted = target("rtx", sms=SMS, prefill=BUCKETS, plugins=used)
            context = TrtContext(graph.stem, wanted, dict.fromkeys((0, 1), (1, 2, 3)))
            lowered = lower(graph, context)
            ir.save(lowered, out / graph.name, external_data=f"{graph.stem}.data")
            output = out / "plan.engine"
            profiles = _profiles(folder, graph.stem, wanted)
            job = EngineJob(graph.stem, out / graph.name, output, profiles, SMS, library_file, embed_plugins=False)
            compile_engine(library, job, lambda *_: None)
            text = plan_text(output.read_bytes())
            found = {
                "folder": folder.name,
                "graph": graph.stem if used == "required" else "dense",
                "sms": read_header(output).sms,
                "accelerators": sorted(accelerators(text)),
                "bounds": sorted(set(profile_bounds(text))),
                "causal": causal_masks(text),
                "attention": context.attention,
                "layers": text.count("custom_layer={"),
                "banks": {
                    name: list(v.shape) for v in lowered.graph.inputs if (name := str(v.name)).startswith("experts.")
                },
                "work": work_memory(text),
                "bytes": output.stat().st_size,
                "seconds": time.monotonic() - start,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
