"""An emulated GPU machine (see emulated_cuda.py and emulated_tensorrt.py)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moiie_runtime.backends import cuda_driver, gpu_info, tensorrt_checks, tensorrt_library
from moiie_runtime.backends.gpu_info import Driver, Gpu
from tests.exports import exported_mome
from tests.runtime.backends.emulated_cuda import EmulatedCuda
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt
from tests.runtime.backends.engine_bundle import VERSION, build


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedCuda]:
    """The emulated driver, where cuda-bindings would be."""
    emulated = EmulatedCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", emulated)
    cuda_driver.driver.cache_clear()
    yield emulated
    cuda_driver.driver.cache_clear()


@pytest.fixture
def trt(cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> EmulatedTensorRt:
    """The emulated TensorRT under both names, on a machine with one GPU of SM 89."""
    emulated = EmulatedTensorRt(cuda, VERSION)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, emulated)
    monkeypatch.setattr(tensorrt_library, "_libraries", lambda: None)
    found = Driver((13, 0), "580.65.06", (Gpu("Emulated GPU", 89, cuda.total),))
    monkeypatch.setattr(gpu_info, "find_driver", lambda: found)
    monkeypatch.setattr(tensorrt_checks, "find_driver", lambda: found)
    return emulated


@pytest.fixture(scope="session")
def engine_bundle(golden_bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden MoIIE with engines: `rtx`, `small` (vision leaves after the prefill), `four` rows, `copying`."""
    copy = tmp_path_factory.mktemp("engines") / "bundle"
    bundle = Path(shutil.copytree(golden_bundle("moiie_phi3"), copy))
    build(bundle, "rtx", {"prefill": (8, 64, 256)})
    build(bundle, "small", {"prefill": (64, 256), "residency": "after_prefill"})
    build(bundle, "four", {"prefill": (64, 256), "batch": 4, "precision": "bfloat16"})
    build(bundle, "copying", {"like": "orin", "sms": (89,), "prefill": (64,), "plugins": "off"})
    return bundle


@pytest.fixture(scope="session")
def mome_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoME with engines: `one` row that keeps everything, and `two` rows whose encoders leave after the prefill."""
    copy = tmp_path_factory.mktemp("mome") / "bundle"
    bundle = Path(shutil.copytree(exported_mome(640).bundle, copy))
    build(bundle, "one", {"prefill": (64, 256)})
    build(bundle, "two", {"prefill": (64, 256), "batch": 2, "residency": "after_prefill"})
    return bundle
