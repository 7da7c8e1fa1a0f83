"""Lowers decoder graphs of bundles and builds them without plugins in this one process; prints a line of JSON a graph.

    python dense_process.py OUT JOB...

JOB is NAME=BUNDLE,GRAPH,SM+SM,BANKS,PRECISION
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from moiie_export.builders.compile_engine import EngineJob, compile_engine
from moiie_export.builders.engine_specs import Profile
from moiie_export.builders.library import load_library
from moiie_export.builders.plan_file import accelerators, plan_text, work_memory
from tests.trt_graphs import lowered, target

PROFILES = {"decoder_prefill": (Profile("prefill_64", {"sequence": (1, 64, 64)}),)}
"""The decode step has no open dimension."""


def main(out: Path, jobs: list[str]) -> None:
    library = load_library("tensorrt_rtx")
    for job in jobs:
        name, _, settings = job.partition("=")
        bundle, graph, listed, banks, precision = settings.split(",")
        sms = tuple(int(sm) for sm in listed.split("+"))
        wanted = target("rtx", sms=sms, plugins="off", banks=banks, precision=precision)
        path = lowered(Path(bundle), graph, wanted).save(out)
        output = out / f"{name}.engine"
        compile_engine(library, EngineJob(graph, path, output, PROFILES.get(graph, ()), sms), lambda *_: None)
        text = plan_text(output.read_bytes())
        stored = re.findall(r'const_payload_size=(\d+) dims=\{ ([\d ]+)\} name="[^"]*" [^\n]*type=(\w+)', text)
        found = {
            "name": name,
            "accelerators": sorted(accelerators(text)),
            "layers": text.count("custom_layer={"),
            "inputs": dict(re.findall(r'name="(experts\.[\w.]+)\.\d+" [^\n]*type=(\w+)', text)),
            "stored": [(int(size), [int(dim) for dim in dims.split()], kind) for size, dims, kind in stored],
            "types": sorted(set(re.findall(r"type=(\w+)", text))),
            "work": work_memory(text),
            "bytes": output.stat().st_size,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
