"""SIGKILL at random moments of a real export: nothing half-written is accepted, and a later run loses nothing."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import sha256_file
from tests.exports import SMALLEST, small_recipe
from tests.synthetic import write_checkpoint

KILLS = 12
# A server process imports these once; every export is a fork of it, so that kills hit the export and not the imports.
PRELOADED = [
    "moiie_export.pipeline",
    "moiie_export.graph.passes",
    "moiie_export.graph.trace",
    "moiie_export.model.load",
    "onnx.checker",
    "onnxscript.function_libs.torch_lib.ops",
    "torch.onnx._internal.exporter._core",
    "tests.warm_exporter",
]


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **SMALLEST)
    _forked(str).join()  # the server has its imports now, which are no part of an export's life
    started = time.monotonic()
    undisturbed = _start(checkpoint, tmp_path / "undisturbed")
    undisturbed.join()
    duration = time.monotonic() - started
    assert undisturbed.exitcode == 0
    expected = _digests(tmp_path / "undisturbed")
    assert "bundle.json" in expected

    seeded, bundle, kills = random.Random(20), tmp_path / "bundle", 0
    while kills < KILLS:
        # A life is rarely long enough for more than one of the three graphs, so every part of an export is hit.
        killed = _live(checkpoint, bundle, seeded.uniform(0, 0.4 * duration))
        kills += killed
        if not killed:
            assert _digests(bundle) == expected
            shutil.rmtree(bundle)
        _check_nothing_half_written_is_accepted(bundle)
    last = _start(checkpoint, bundle)
    last.join()
    assert last.exitcode == 0
    assert _digests(bundle) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint", "undisturbed", "vision_tower"]


def _live(checkpoint: Path, bundle: Path, seconds: float) -> bool:
    """Let an export live for so long; whether it had to be killed."""
    process = _start(checkpoint, bundle)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode != 0


def _start(checkpoint: Path, bundle: Path) -> BaseProcess:
    return _forked(_export, checkpoint, bundle)


def _forked(work: Callable[..., object], *arguments: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def _export(checkpoint: Path, bundle: Path) -> None:
    export_bundle(ExportRequest(checkpoint, bundle, small_recipe()))


def _check_nothing_half_written_is_accepted(bundle: Path) -> None:
    partial = bundle.with_name("bundle.partial")
    if bundle.exists():
        assert Bundle.open(bundle).verify() == []
        return
    for path in (bundle, partial) if partial.exists() else (bundle,):
        with pytest.raises(MoiieError, match=r"did not finish|no such bundle"):
            Bundle.open(path)


def _digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if not path.is_dir()]
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}
