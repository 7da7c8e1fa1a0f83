"""`moiie parity --plugins` and `--gpu`, on an emulated GPU; and --bisect where PyTorch is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from moiie_export.builders import BuildRequest
from moiie_export.builders import build as build_target
from moiie_export.builders.compile_engine import EngineJob
from moiie_export.parity import bisect_tensorrt, polygraphy
from moiie_export.parity.report import Check
from moiie_export.parity.run import Parity
from moiie_export.targets import find_target
from moiie_runtime.backends import tensorrt_checks
from moiie_runtime.backends.gpu_info import Driver, Gpu
from moiie_runtime.errors import MoiieError
from tests.cli.conftest import Moiie
from tests.exports import smallest_with_room
from tests.plugins.cpp.shell import released
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt
from tests.runtime.backends.engine_bundle import build

STOP = "one graph was built again"
BLOCKED = """
import sys
for name in ("torch", "onnxscript", "transformers", "safetensors", "triton"):
    sys.modules[name] = None
import moiie_export.parity.bisect_tensorrt
from moiie_export.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `moiie plugins build` puts it."""
    folder = tmp_path_factory.mktemp("library") / "plugins-build"
    return Path(shutil.copytree(released().library.parent, folder)) / released().library.name


@pytest.fixture(scope="module")
def bundle(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target `held` has the library in its engines, `rtx` has none, `cpu` has a bad node."""
    copy = Path(shutil.copytree(smallest_with_room().bundle, tmp_path_factory.mktemp("parity") / "bundle"))
    build(copy, "held", {"sms": (89,), "prefill": (128,), "plugins": "required"}, library)
    build(copy, "rtx", {"prefill": (128,), "plugins": "off"}, dialect=True)
    build_target(BuildRequest(copy, find_target("cpu")), lambda *_: None)
    path = copy / "engines" / "cpu" / "decoder_decode.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(each for each in model.graph.node if each.op_type == "SimplifiedLayerNormalization")
    next(each for each in node.attribute if each.name == "epsilon").f = 9.0
    onnx.save(model, path)
    return copy


@pytest.fixture
def jobs(trt: EmulatedTensorRt, monkeypatch: pytest.MonkeyPatch) -> list[EngineJob]:
    """What TensorRT was asked to build; the first such job is the last."""
    found: list[EngineJob] = []

    def run_job(_: str, job: EngineJob, __: Any) -> None:
        found.append(job)
        raise MoiieError(STOP)

    monkeypatch.setattr(bisect_tensorrt, "run_job", run_job)
    return found


def test_the_library_is_the_one_that_is_named_or_the_one_that_was_built_here(
    moiie: Moiie, bundle: Path, library: Path, jobs: list[EngineJob], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bisect = ("parity", bundle, "--bisect", "--target", "held")
    result = moiie(*bisect)
    assert result.code == 4
    assert "there is no plugins-build/libmoiie_plugins.so" in result.error
    (tmp_path / "other.so").write_bytes(b"other")
    result = moiie(*bisect, "--plugins", tmp_path / "other.so")
    assert result.code == 4
    assert "other.so has d9298a10d1b0" in result.error
    assert not jobs
    assert moiie(*bisect, "--plugins", library).error == STOP
    monkeypatch.chdir(library.parent.parent)
    assert moiie(*bisect).error == STOP
    assert [job.name for job in jobs] == ["vision_encoder"] * 2


@pytest.mark.parametrize("target", ["rtx", "cpu"])
def test_a_library_that_no_engine_holds_is_not_asked_for(
    moiie: Moiie, bundle: Path, library: Path, target: str
) -> None:
    result = moiie("parity", bundle, "--bisect", "--target", target, "--plugins", library)
    assert result.code == 1
    assert result.error == f"--plugins: the engines of target {target} hold no plugin library"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--checkpoint", "x", "--target", "held", "--plugins", "y"], 2, "--plugins goes with --bisect"),
        (["--checkpoint", "x", "--gpu", "1"], 2, "--gpu goes with --target"),
        (["--bisect", "--target", "held", "--gpu", "-1"], 2, "--gpu"),
        (["--bisect", "--target", "cpu", "--gpu", "0"], 1, "gpu: target cpu was not built for a GPU"),
        (["--checkpoint", "CHECKPOINT", "--target", "portable", "--gpu", "0"], 1, "gpu: portable is no form"),
    ],
)
def test_options_that_go_together(moiie: Moiie, bundle: Path, arguments: list[str], code: int, says: str) -> None:
    checkpoint = str(smallest_with_room().checkpoint)
    result = moiie("parity", bundle, *[checkpoint if each == "CHECKPOINT" else each for each in arguments])
    assert result.code == code
    assert says in result.err


@pytest.mark.parametrize("mode", ["--bisect", "--polygraphy", ""])
def test_the_gpu_that_is_named_runs_the_engines(
    moiie: Moiie,
    bundle: Path,
    mode: str,
    trt: EmulatedTensorRt,
    jobs: list[EngineJob],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engines are for the second of two GPUs; each mode is stopped when it has opened what it compares."""
    monkeypatch.setattr(polygraphy, "compare", lambda *_: [Check("logits", "error", 0.0, 1.0, True)])
    monkeypatch.setattr(Parity, "_compare", lambda *_: None)
    gpus = (Gpu("Old GPU", 75, trt.cuda.total), Gpu("Emulated GPU", 89, trt.cuda.total, 1))
    monkeypatch.setattr(tensorrt_checks, "find_driver", lambda: Driver((13, 0), "580.65.06", gpus))
    trt.cuda.devices = 2
    checkpoint = () if mode == "--bisect" else ("--checkpoint", smallest_with_room().checkpoint)
    arguments = ("parity", bundle, "--target", "rtx", *checkpoint, *([mode] if mode else []))
    for given, says in ((), "Old GPU, has SM 75"), (("--gpu", 2), "there is no GPU 2 here"):
        result = moiie(*arguments, *given)
        assert (result.code, says in result.error) == (4, True), result.err
    result = moiie(*arguments, "--gpu", 1)
    assert trt.cuda.used_device == 1, result.err
    assert (result.error == STOP) if mode == "--bisect" else (result.code == 0), result.err
    assert bool(jobs) is (mode == "--bisect")
    assert not any(trt.cuda.left.values())


def test_no_pytorch_is_needed(bundle: Path, tmp_path: Path) -> None:
    """On a device that has none; not even to write what differs."""
    command = [sys.executable, "-c", BLOCKED, "parity", str(bundle), "--bisect", "--target", "cpu", "--json"]

    done = subprocess.run(
        [*command, "--save", str(tmp_path / "differences")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    (difference,) = json.loads(done.stdout)["differences"]
    assert difference["component"] == "decoder_decode"
    assert difference["origin"], "which is written by the exporter, and read here"
    assert (tmp_path / "differences" / "decoder_decode-engine.json").is_file()
