"""Bundles with engines for the emulation: the real builder writes everything but the plans themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiie_export.builders import BuildRequest
from moiie_export.builders import tensorrt as builder
from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.library import Library
from moiie_export.targets import BUILT_IN
from moiie_runtime.bundle import Bundle
from moiie_runtime.strict_files import sha256_file
from moiie_runtime.tensors import TensorFile
from tests.runtime.backends.emulated_cuda import EmulatedCuda
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt, write_plan

VERSION = "1.7.1.116"
CONSTANTS, WORKSPACE = 1 << 20, 65536
"""Bytes on the device of each engine's weights, and of the largest intermediate results."""


def build(
    bundle: Path, name: str, settings: dict[str, Any], plugins: Path | None = None, *, dialect: bool = False
) -> list[EngineJob]:
    """BUNDLE/engines/<name>, a target like the built-in one with other settings; what TensorRT was asked for.

    Its plans compute the bundle's own graphs, or with `dialect` what TensorRT would have been given.
    """
    target = replace(BUILT_IN[settings.pop("like", "rtx")], name=name, **settings)
    jobs: list[EngineJob] = []

    def run_job(backend: str, job: EngineJob, progress: Any) -> None:
        jobs.append(job)
        job.output.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        fake = EmulatedTensorRt(EmulatedCuda(), VERSION)
        patch.setattr(builder, "load_library", lambda backend: Library(fake, backend, VERSION))
        patch.setattr(builder, "device_sm", lambda: target.sms[0])
        patch.setattr(builder, "supported_sms", lambda library, target: target.sms)
        patch.setattr(builder, "run_job", run_job)
        patch.setattr(builder, "_check_header", lambda *_: None)
        patch.setattr(builder, "cuda_floor", lambda backend: {"cuda": "12.0", "driver": "525.60.13"})
        request = BuildRequest(bundle, target, plugin_library=plugins, keep_graphs=dialect)
        builder.build_engines(request, lambda *_: None)
    write_plans(bundle, name, dialect=dialect)
    return jobs


def write_plans(bundle: Path, name: str, **changes: Any) -> None:
    """Plans for what engine.json describes; of a dialect where `dialect` is among the changes."""
    folder = bundle / "engines" / name
    document = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    opened, banks = Bundle.open(bundle), TensorFile(folder / document["weights_file"])
    for component, described in document["components"].items():
        names = [each for bank in document["banks"] if component in bank["components"] for each in bank["inputs"]]
        own = folder / "graphs" / f"{component}.onnx" if changes.get("dialect") else None
        plan = {
            **{key: described[key] for key in ("inputs", "outputs", "profiles", "aliases")},
            "graph": str(own or opened.path(opened.components[component].file)),
            "banks": {} if own else {each: str(_bytes_of(banks, each, folder.parent)) for each in names},
            "batch": document["settings"]["batch"],
            "host": [],
            "workspace": 4096 if component == "decoder_decode" else WORKSPACE,
            "constants": CONSTANTS,
            **changes,
        }
        write_plan(folder / described["file"], plan)
        digest = {
            "sha256": sha256_file(folder / described["file"]),
            "bytes": (folder / described["file"]).stat().st_size,
        }
        document["files"][described["file"]] = digest
    (folder / "engine.json").write_text(json.dumps(document), encoding="utf-8")


def edit(bundle: Path, name: str, **changes: Any) -> None:
    """Change engine.json."""
    path = bundle / "engines" / name / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def _bytes_of(banks: TensorFile, name: str, folder: Path) -> Path:
    """A file with the bytes of a bank, for the emulation to compare."""
    info = banks.header[name]
    path = folder / f"{name}.{info.dtype}.bytes"
    with banks.path.open("rb") as file:
        file.seek(info.offset)
        np.frombuffer(file.read(info.nbytes), np.uint8).tofile(path)
    return path
