"""`moiie doctor` about CUDA and TensorRT: what is here, and what an engine would lack."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moiie_export.cli import nvidia
from moiie_export.cli.nvidia import nvidia_findings
from moiie_runtime.backends.gpu_info import Driver, Gpu
from tests.cli.conftest import Moiie

ORIN = Driver((12, 6), "540.4.0", (Gpu("Orin", 87, 8 << 30),))


def said(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, versions: dict[str, str]
) -> dict[str, tuple[str, str]]:
    monkeypatch.setattr(nvidia, "find_driver", lambda: driver)
    monkeypatch.setattr(nvidia, "installed_version", versions.get)
    monkeypatch.setattr(nvidia, "installed", versions.get)
    return {each.name: (each.status, f"{each.detail} {each.hint or ''}") for each in nvidia_findings()}


def test_without_a_gpu_it_says_so_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moiie: Moiie
) -> None:
    monkeypatch.chdir(tmp_path)
    found = said(monkeypatch, None, {})
    assert found["cuda"] == ("info", "no NVIDIA driver: targets for a GPU cannot run here ")
    assert "JetPack" in found["tensorrt"][1]
    assert "pip install 'moiie-export[tensorrt-rtx]'" in found["tensorrt"][1]
    assert "pip install 'moiie-export[tensorrt]'" in found["cuda-bindings"][1]
    assert "moiie plugins build" in found["tensorrt plugins"][1]
    assert {status for status, _ in found.values()} == {"info"}
    result = moiie("doctor", "--json")
    assert {*found} <= {each["name"] for each in result.document["findings"]}
    found = said(monkeypatch, Driver((12, 6), None, (), 100), {})
    assert found["cuda"][1].startswith("CUDA 12.6; it sees no GPU (CUDA error 100)")


def test_on_a_gpu_machine_everything_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    library = tmp_path / nvidia.PLUGINS
    library.parent.mkdir()
    library.touch()
    library.with_suffix(".json").write_text(json.dumps({"sms": [87, 110]}), encoding="utf-8")
    versions = {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1.116", "cuda-bindings": "12.9.10"}
    assert said(monkeypatch, ORIN, versions) == {
        "cuda": ("ok", "driver 540.4.0, CUDA 12.6 "),
        "gpu 0": ("ok", "Orin, SM 87, 8.0 GiB "),
        "tensorrt": ("ok", "10.3.0 "),
        "tensorrt_rtx": ("ok", "1.7.1.116 "),
        "cuda-bindings": ("ok", "12.9.10 "),
        "tensorrt plugins": ("ok", f"{nvidia.PLUGINS} for SM 87, 110 "),
    }
    second = replace(ORIN, gpus=(replace(ORIN.gpus[0], index=1),))  # the first does not answer
    assert [name for name in said(monkeypatch, second, versions) if name.startswith("gpu")] == ["gpu 1"]


def test_bindings_newer_than_the_driver_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = said(monkeypatch, ORIN, {"cuda-bindings": "13.5.0"})["cuda-bindings"]
    assert status == "warn"
    assert "pip install 'cuda-bindings==12.*'" in text
