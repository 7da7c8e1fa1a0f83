"""`moiie doctor BUNDLE` about built forms: whether each runs here, what is missing, and what it takes on its GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moiie_export.builders import BuildRequest, build
from moiie_export.cli import built
from moiie_export.targets import find_target
from moiie_runtime.backends import onnxruntime_cuda, tensorrt_checks
from moiie_runtime.backends.gpu_info import Driver, Gpu
from moiie_runtime.bundle import Bundle
from moiie_runtime.device_memory import estimate_device
from moiie_runtime.engines import open_engine
from moiie_runtime.memory import Request, estimate_memory
from moiie_runtime.sizes import readable
from tests.cli.conftest import Moiie
from tests.runtime.backends.engine_bundle import build as build_emulated
from tests.runtime.backends.engine_bundle import edit

HERE = Driver((13, 0), "580.65.06", (Gpu("Emulated GPU", 89, 1 << 30),))


@pytest.fixture(scope="module")
def engines(golden_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with `rtx`, `ort-cuda` and `cpu`."""
    copy = Path(shutil.copytree(golden_bundle("moiie_phi3"), tmp_path_factory.mktemp("doctor") / "b"))
    build_emulated(copy, "rtx", {"prefill": (64,)})
    for name in ("ort-cuda", "cpu"):
        build(BuildRequest(copy, find_target(name)), lambda *_: None)
    return copy


def findings(moiie: Moiie, bundle: Path) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in moiie("doctor", bundle, "--json").document["findings"]}


def place(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    for module in (built, tensorrt_checks):
        monkeypatch.setattr(module, "find_driver", lambda: driver)


def needed(bundle: Path, target: str) -> str:
    opened = Bundle.open(bundle)
    request = Request(prompt_tokens=opened.tokens.image_tokens + 100, new_tokens=256, images=1)
    return f"{target}: a question about one picture takes about " + readable(
        estimate_device(open_engine(opened, target), request).peak
    )


def test_without_a_gpu_each_form_says_what_is_missing(
    moiie: Moiie, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, None)
    found = findings(moiie, engines)
    assert found["target cpu"]["status"] == "ok"
    assert found["target rtx"]["status"] == found["target ort-cuda"]["status"] == "info"
    assert "engine rtx needs a GPU: there is no NVIDIA driver here" in found["target rtx"]["detail"]
    assert "is for CPUs only" in found["target ort-cuda"]["detail"]
    assert "moiie-export[gpu]" in found["target ort-cuda"]["hint"]
    for target in ("rtx", "ort-cuda"):
        assert found[f"fits {target}"]["detail"] == f"{needed(engines, target)} on the GPU"
    assert found["fits"]["detail"].startswith("cpu: a question")  # what `moiie run` would take
    result = moiie("doctor", engines)
    assert result.code == 0
    assert "target rtx: run it on a machine with an NVIDIA GPU" in result.err


def test_with_a_gpu_the_prediction_is_compared_with_what_is_free(
    moiie: Moiie, engines: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, HERE)
    monkeypatch.setattr(onnxruntime_cuda.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "_check_libraries", lambda folder: None)
    monkeypatch.setattr(onnxruntime_cuda, "check_release", lambda needs, installed: None)
    trt.cuda.total = 1 << 30
    found = findings(moiie, engines)
    assert found["target rtx"]["detail"] == "tensorrt_rtx 1.7.1.116 on GPU 0, Emulated GPU"
    assert found["target ort-cuda"]["detail"] == "onnxruntime_cuda on GPU 0, Emulated GPU"
    assert found["fits rtx"]["detail"] == f"{needed(engines, 'rtx')} on the GPU, 1.0 GiB available"
    assert {found[f"fits {name}"]["status"] for name in ("rtx", "ort-cuda")} == {"ok"}
    assert not any(trt.cuda.left.values())
    trt.cuda.total = 1 << 20
    found = findings(moiie, engines)
    assert found["fits rtx"]["status"] == "warn"
    assert "smaller prefill profiles" in found["fits rtx"]["hint"]


def test_too_little_host_memory_is_no_failure_where_a_gpu_answers(
    moiie: Moiie, engines: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, HERE)
    monkeypatch.setattr(built, "available_memory", lambda: 2**20)
    trt.cuda.total = 1 << 30
    result = moiie("doctor", engines)
    assert result.code == 0
    assert "fits: it runs with --target rtx" in result.err
    place(monkeypatch, None)
    assert moiie("doctor", engines).code == 4


def test_the_second_gpu_is_looked_at_too(
    moiie: Moiie, engines: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = replace(HERE.gpus[0], index=1)
    place(monkeypatch, replace(HERE, gpus=(Gpu("Old GPU", 75, 1 << 30), second)))
    trt.cuda.devices, trt.cuda.total = 2, 1 << 30
    assert findings(moiie, engines)["target rtx"]["detail"].endswith("on GPU 1, Emulated GPU (--gpu 1)")
    assert trt.cuda.used_device == 1
    place(monkeypatch, replace(HERE, gpus=(second,)))  # the first does not answer
    assert findings(moiie, engines)["target rtx"]["detail"].endswith("on GPU 1, Emulated GPU (--gpu 1)")
    place(monkeypatch, replace(HERE, gpus=(Gpu("Old GPU", 75, 1 << 30), Gpu("Older GPU", 70, 1 << 30, 1))))
    detail = findings(moiie, engines)["target rtx"]["detail"]
    assert "Old GPU, has SM 75" in detail
    assert "Older GPU, has SM 70" in detail


def test_a_form_of_another_export_is_a_warning_and_a_damaged_one_too(
    moiie: Moiie, engines: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(engines, tmp_path / "b"))
    edit(copy, "rtx", source={})
    (copy / "engines" / "ort-cuda" / "weights.safetensors").unlink()
    result = moiie("doctor", copy)
    assert result.code == 0
    assert "was built from another export of this bundle" in result.out
    assert "engines/ort-cuda/weights.safetensors: is missing" in result.out
    for target in ("rtx", "ort-cuda"):
        assert f"target {target}: build it again: moiie build {copy} --target {target} --force" in result.err


@pytest.mark.parametrize(("old", "new"), [('"tensorrt_rtx"', '"foo"'), ('"dtype": "int64"', '"dtype": "int65"')])
def test_a_form_that_cannot_be_understood_is_a_warning(
    moiie: Moiie, engines: Path, tmp_path: Path, old: str, new: str
) -> None:
    copy = Path(shutil.copytree(engines, tmp_path / "b"))
    path = copy / "engines" / "rtx" / "engine.json"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    found = findings(moiie, copy)
    assert (found["target rtx"]["status"], new.split('"')[-2] in found["target rtx"]["detail"]) == ("warn", True)
    assert "fits rtx" not in found
    assert moiie("doctor", copy).code == 0


def test_what_runs_without_a_target_must_run(moiie: Moiie, engines: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engines, tmp_path / "b"))
    document = json.loads((copy / "engines" / "cpu" / "engine.json").read_text(encoding="utf-8"))
    edit(copy, "cpu", needs={**document["needs"], "moiie.cpu": "0"})
    result = moiie("doctor", copy)
    assert result.code == 4
    assert "layout 0 of our kernels" in result.error
    assert "--target cpu" in result.hint
    edit(copy, "cpu", needs=document["needs"], source={})
    result = moiie("doctor", copy)
    assert result.code == 4
    assert "target cpu: was built from another export of this bundle" in result.error


def test_without_built_forms_the_bundles_own_graphs_count(moiie: Moiie, golden_bundle: Callable[[str], Path]) -> None:
    bundle = golden_bundle("moiie_phi3")
    opened = Bundle.open(bundle)
    request = Request(prompt_tokens=opened.tokens.image_tokens + 100, new_tokens=256, images=1)
    detail = findings(moiie, bundle)["fits"]["detail"]
    assert detail.startswith(
        f"portable: a question about one picture takes about {readable(estimate_memory(opened, request).total)}"
    )
