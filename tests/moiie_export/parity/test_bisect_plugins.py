"""Engines that hold their plugin library are built again with that library, and with no other."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import onnx
import pytest

from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.engine_process import run_job
from moiie_export.parity import bisect_tensorrt
from moiie_export.parity.bisect_graphs import readable
from moiie_export.parity.bisect_sides import values_of
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine, open_engine
from moiie_runtime.errors import MissingDependency
from moiie_runtime.strict_files import sha256_file
from tests.exports import SMALLEST, exported
from tests.plugins.cpp.shell import released
from tests.rtx import need_rtx
from tests.runtime.backends.conftest import cuda, trt
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt
from tests.runtime.backends.engine_bundle import build

__all__ = ["cuda", "trt"]


class Built(Exception):
    """A marked graph was built; what follows needs a GPU."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target `held` has the library in its engines, `beside` has it as a file, `without` has none."""
    copy = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("plugins") / "bundle"))
    library = released().library
    common = {"sms": (89,), "prefill": (64,)}
    build(copy, "held", {**common, "plugins": "required", "embed_plugins": True}, library)
    build(copy, "beside", {**common, "plugins": "required", "embed_plugins": False}, library)
    build(copy, "without", {**common, "plugins": "off"})
    return copy


def opened(engine: Engine, component: str, plugins: Path | None, monkeypatch: pytest.MonkeyPatch, real: bool) -> Any:
    """The job that came of a marked graph, and its plan."""
    jobs: list[tuple[EngineJob, bytes]] = []

    def once(backend: str, job: EngineJob, progress: Any) -> None:
        if real:
            run_job(backend, job, progress)
        jobs.append((job, job.output.read_bytes() if real else b""))
        raise Built

    monkeypatch.setattr(bisect_tensorrt, "run_job", once)
    options = engine.options()
    try:
        with closing(values_of(engine, options, plugins)) as values:
            graph = values.graph(component)
            names = [name for node in graph.graph.node for name in node.output if name in readable(graph)]
            with pytest.raises(Built), values.open(component, graph, names[:8]):
                pass
    finally:
        options.close()
    return *jobs[0], names[:8], graph


def test_tensorrt_builds_graphs_with_nodes_of_the_library(
    trt: EmulatedTensorRt, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real TensorRT for RTX, up to the plan, which holds the library as the engine's own does."""
    need_rtx()
    engine = open_engine(Bundle.open(bundle), "held")
    _, plan, names, graph = opened(engine, "decoder_decode", released().library, monkeypatch, real=True)
    assert any(each.name == "plugin_namespace" for each in _attributes(graph))
    assert all(name.encode() in plan for name in names)
    assert released().library.read_bytes() in plan


@pytest.mark.parametrize(
    ("target", "component", "used", "embedded"),
    [
        ("held", "decoder_decode", True, True),
        ("held", "vision_encoder", False, True),
        ("beside", "decoder_decode", True, False),
        ("without", "decoder_decode", False, False),
    ],
)
def test_the_library_is_given_as_when_the_engine_was_built(
    trt: EmulatedTensorRt,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    component: str,
    used: bool,
    embedded: bool,
) -> None:
    engine = open_engine(Bundle.open(bundle), target)
    candidate = released().library if target == "held" else Path("no such file")
    job, *_ = opened(engine, component, candidate, monkeypatch, real=False)
    assert job.embed_plugins is embedded
    assert (job.plugins is not None) is used
    if used:
        assert sha256_file(job.plugins) == sha256_file(released().library)
        assert (bundle in job.plugins.parents) is not embedded


@pytest.mark.parametrize("candidate", [None, "missing.so", "other.so", "."])
def test_another_library_is_not_taken(
    trt: EmulatedTensorRt, bundle: Path, tmp_path: Path, candidate: str | None
) -> None:
    (tmp_path / "other.so").write_bytes(b"another library")
    engine = open_engine(Bundle.open(bundle), "held")
    options = engine.options()
    try:
        with pytest.raises(MissingDependency) as caught:
            values_of(engine, options, None if candidate is None else tmp_path / candidate)
    finally:
        options.close()
    assert f"sha256 {sha256_file(released().library)[:12]}" in caught.value.message
    assert (str(tmp_path) in caught.value.message) is (candidate is not None)
    assert caught.value.hint is not None
    assert f"moiie parity {bundle} --bisect --target held --plugins LIBRARY" in caught.value.hint
    assert "moiie plugins build --sm 89" in caught.value.hint
    assert not any(trt.cuda.left.values())


def _attributes(model: onnx.ModelProto) -> list[onnx.AttributeProto]:
    return [each for node in model.graph.node for each in node.attribute]
