"""Tracing in another process: the same bundle, errors that arrive, and no process that outlives the export."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_export import graph_process, pipeline
from moiie_export.graph_process import GraphJob, Tracer
from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_export.source import ModelSource
from moiie_export.weights_stage import WeightsJob
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError, Unsound
from tests.exports import SMALLEST, exported


@pytest.fixture(scope="module")
def job() -> Iterator[GraphJob]:
    with ModelSource.open(exported(SMALLEST).checkpoint) as source:
        specs = WeightsJob.plain(source, "float32").specs()
        yield GraphJob(("vision_encoder", "decoder_decode"), source.config, source.weight_map, 64, {}, specs)


def test_the_bundle_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All graphs come from the other process, and no byte differs."""
    usual = exported(SMALLEST)
    monkeypatch.setattr(pipeline, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(pipeline, "available_cores", lambda: 2)
    monkeypatch.setattr(pipeline, "write_graph", lambda name, *_: pytest.fail(f"{name} was traced here"))
    export_bundle(ExportRequest(usual.checkpoint, tmp_path / "bundle", usual.recipe))
    assert Bundle.open(tmp_path / "bundle").verify() == []
    for name in ("bundle.json", *(path.relative_to(usual.bundle) for path in (usual.bundle / "onnx").iterdir())):
        assert (tmp_path / "bundle" / name).read_bytes() == (usual.bundle / name).read_bytes()


@pytest.mark.parametrize(("least", "cores"), [(1 << 30, 8), (0, 1)], ids=["small", "one core"])
def test_no_process_is_started_where_it_gains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, cores: int
) -> None:
    usual = exported(SMALLEST)  # before anything is in its way

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "PARALLEL_BYTES", least)
    monkeypatch.setattr(pipeline, "available_cores", lambda: cores)
    monkeypatch.setattr(Tracer, "__init__", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(pipeline, "write_graph", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(ExportRequest(usual.checkpoint, tmp_path / "bundle", usual.recipe))


def test_a_process_that_dies_is_named_and_stops_the_export(job: GraphJob, tmp_path: Path) -> None:
    with Tracer(job) as tracer:
        tracer.check()
        assert tracer._process is not None
        tracer._process.kill()
        with pytest.raises(MoiieError, match=r"vision_encoder: the process that traced it ended \(-9\)") as caught:
            tracer.write("vision_encoder", tmp_path)
        assert "memory" in str(caught.value.hint)
        with pytest.raises(MoiieError, match="ended"):
            tracer.check()
    assert not list(tmp_path.iterdir())


def test_errors_of_the_other_process_arrive_as_they_were(job: GraphJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Any:
        def refuse(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(graph_process, "write_graph", refuse)
        return pickle.loads(pickle.dumps(graph_process._traced("decoder_decode", job, Path("nowhere"))))

    with pytest.raises(Unsound, match="a rule") as caught:
        graph_process._require(raising(Unsound("a rule is wrong", "mend it")))
    assert (caught.value.message, caught.value.hint) == ("a rule is wrong", "mend it")
    with pytest.raises(RuntimeError, match="^decoder_decode: KeyError: 'head'$") as unforeseen:
        graph_process._require(raising(KeyError("head")))
    assert "in refuse" in str(unforeseen.value.__cause__), "-vv shows where it was raised"


_DYING = """
import os, pickle, sys
from moiie_export.graph_process import Tracer
with Tracer(pickle.load(sys.stdin.buffer)) as tracer:
    print(tracer._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_no_process_outlives_an_export_that_is_killed(job: GraphJob) -> None:
    done = subprocess.run([sys.executable, "-c", _DYING], input=pickle.dumps(job), capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + 300
    while _runs(done.stdout.decode().strip()):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)


def _runs(process: str) -> bool:
    try:
        return "(zombie)" not in (Path("/proc") / process / "status").read_text()
    except OSError:
        return False
