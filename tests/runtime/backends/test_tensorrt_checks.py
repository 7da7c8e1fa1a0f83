"""What keeps an engine from running here is said in one order, before anything of it is loaded, and with a way out."""

from __future__ import annotations

import builtins
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moiie_export.cli import main
from moiie_runtime.backends import cuda_driver, gpu_info, tensorrt_checks, tensorrt_library
from moiie_runtime.backends.gpu_info import Driver, Gpu
from moiie_runtime.backends.tensorrt_checks import check_machine
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine
from moiie_runtime.errors import MissingDependency

HERE = Driver((13, 0), "580.65.06", (Gpu("Emulated GPU", 89, 1 << 30),))
DOCUMENT = {
    "sms": [86, 89],
    "floor": {"cuda": "12.4", "driver": "550.54.14"},
    "plugins": {"file": "libmoiie_plugins.so", "sha256": "0" * 64, "embedded": False},
}


@pytest.fixture
def engine(trt, manifest, write_bundle) -> Engine:
    bundle = Bundle.open(write_bundle(manifest))
    (bundle.root / "engines" / "rtx").mkdir(parents=True)
    return Engine("rtx", "tensorrt_rtx", bundle, {"tensorrt_rtx": trt.__version__}, None, False, bundle, DOCUMENT)


def test_the_first_thing_that_is_missing_is_named(engine, trt, monkeypatch):
    """Everything is wrong at first, and mended in the order in which it is asked for."""
    wrong = replace(engine, needs={"tensorrt_rtx": "9.9"}, document={**DOCUMENT, "sms": [87]})
    here = {"driver": None}
    monkeypatch.setattr(tensorrt_checks, "find_driver", lambda: here["driver"])
    trt.cuda.CUDA_VERSION = 14000

    def refused(engine: Engine, says: str, hint: str) -> None:
        with pytest.raises(MissingDependency, match=says) as caught:
            check_machine(engine)
        assert caught.value.exit_code == 4
        assert hint in str(caught.value.hint)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        patch.setitem(sys.modules, "cuda.bindings.driver", None)
        cuda_driver.driver.cache_clear()
        refused(wrong, "tensorrt_rtx cannot be imported", "pip install 'moiie-export[tensorrt-rtx]'")
        patch.setitem(sys.modules, "tensorrt", None)
        refused(replace(wrong, backend="tensorrt"), "tensorrt cannot be imported", "JetPack")
        patch.setitem(sys.modules, "tensorrt_rtx", trt)
        refused(wrong, "cuda-bindings cannot be imported", "pip install 'moiie-export[tensorrt]'")
    refused(wrong, "was built with tensorrt_rtx 9.9, here is 1.7.1.116", "pip install 'tensorrt-rtx==9.9'")
    jetson = replace(wrong, backend="tensorrt", needs={"tensorrt": "10.3.0"})
    refused(jetson, "was built with tensorrt 10.3.0, here is 1.7.1.116", "the release of JetPack decides")
    wrong = replace(wrong, needs=engine.needs)
    refused(wrong, "there is no NVIDIA driver here", "moiie doctor")
    here["driver"] = Driver((12, 2), "535.1.2", (), 100)
    refused(wrong, r"the driver sees none \(CUDA error 100\)", "moiie doctor")
    here["driver"] = replace(here["driver"], gpus=HERE.gpus)
    refused(wrong, "cuda-bindings 14 needs a driver for CUDA 14, the one here is for 12.2", "cuda-bindings==12.*")
    trt.cuda.CUDA_VERSION = 12060
    refused(wrong, "the CUDA release of the driver is 12.2, tensorrt_rtx needs at least 12.4", "update NVIDIA's driver")
    here["driver"] = replace(here["driver"], cuda=(12, 10))  # by number, not by letter
    refused(wrong, "the driver is 535.1.2, tensorrt_rtx needs at least 550.54.14", "update NVIDIA's driver")
    here["driver"] = replace(here["driver"], version=None)  # some systems do not say it
    refused(
        wrong, "built for SM 87; the GPU here, Emulated GPU, has SM 89", "--sm 87,89 --plugins LIBRARY, if tensorrt_rtx"
    )
    wrong = replace(wrong, document=DOCUMENT)
    refused(wrong, "libmoiie_plugins.so: the plugin library of engine rtx is missing", "moiie plugins build")
    library = Path(engine.bundle.root, "engines", "rtx", "libmoiie_plugins.so")
    library.write_bytes(b"another")
    refused(wrong, "is not the plugin library that engine rtx was built with", "moiie plugins build")
    digest = tensorrt_checks.sha256_file(library)
    right = replace(wrong, document={**DOCUMENT, "plugins": {**DOCUMENT["plugins"], "sha256": digest}})
    assert check_machine(right).trt is trt


def refusal(engine: Engine, **document: object) -> MissingDependency:
    """Why an engine whose engine.json says this cannot run here."""
    with pytest.raises(MissingDependency) as caught:
        check_machine(replace(engine, document={**engine.document, **document}))
    assert caught.value.exit_code == 4
    return caught.value


def test_for_another_gpu_only_what_can_be_built_is_proposed(engine):
    known = [80, 86, 89, 120]
    said = refusal(engine, sms=[86, 120], library_sms=known)
    assert "was built for SM 86, 120; the GPU here, Emulated GPU, has SM 89" in said.message
    again = f"moiie build {engine.bundle.root} --target rtx --sm"
    assert said.hint == f"{again} 86,89,120 --plugins LIBRARY"
    assert refusal(engine, sms=[120], library_sms=known, plugins=None).hint == f"{again} 89,120"
    said = refusal(engine, sms=[86], library_sms=[80, 86])
    assert str(said.hint).startswith("tensorrt_rtx builds for SM 80, 86 only: build for another target")
    assert refusal(engine, sms=[86]).hint == f"{again} 86,89 --plugins LIBRARY, if tensorrt_rtx builds for it"
    full = replace(engine, backend="tensorrt", needs={})
    assert (
        refusal(full, sms=[87], library_sms=known).hint == f"build it here, on this GPU: {again} 89 --plugins LIBRARY"
    )


def test_a_library_without_kernels_for_the_gpu_is_refused(engine, trt):
    """Stored in the engines or beside them; older engines do not say which kernels there are."""
    for kernels in (None, {"sms": [80, 90], "portable": []}, {"sms": [90], "portable": [80]}):
        embedded = {"file": None, "embedded": True, "kernels": kernels}
        assert check_machine(replace(engine, document={**DOCUMENT, "plugins": embedded})).trt is trt
    said = refusal(engine, plugins={"file": None, "embedded": True, "kernels": {"sms": [90, 120], "portable": [90]}})
    assert (
        "its plugin library has kernels for SM 90, 120, none that the GPU here, Emulated GPU with SM 89" in said.message
    )
    again = f"moiie build {engine.bundle.root} --target rtx --plugins plugins-build/libmoiie_plugins.so"
    assert said.hint == f"moiie plugins build --sm 89,90,120, then {again}"


def test_without_a_gpu_run_says_what_is_missing(trt, engine_bundle, monkeypatch, capsys):
    monkeypatch.setattr(tensorrt_checks, "find_driver", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(engine_bundle), "--target", "rtx", "-p", "Describe."])
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert "error: engine rtx needs a GPU: there is no NVIDIA driver here" in said
    assert "moiie doctor" in said
    assert not any(trt.cuda.left.values())


def test_jetpacks_driver_says_what_it_is(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(gpu_info, "_VERSION_FILE", file)
    assert gpu_info._own_version() is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\nGCC version: 11.4"
    )
    assert gpu_info._own_version() == "540.4.0"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:16:58 UTC 2025\n")
    assert gpu_info._own_version() == "580.65.06"


class Cuda:
    """libcuda as ctypes shows it, with two GPUs."""

    init = 0
    silent = ()
    """Numbers of GPUs that do not answer."""

    def __getattr__(self, name):
        numbers = {"cuDriverGetVersion": 12060, "cuDeviceGetCount": 2}

        def call(*arguments):
            if name == "cuInit":
                return self.init
            if name == "cuDeviceGet":
                arguments[0]._obj.value = arguments[1]
                return 999 if arguments[1] in self.silent else 0
            elif name == "cuDeviceGetName":
                arguments[0].value = f"GPU {arguments[2].value}".encode()
            elif name == "cuDeviceTotalMem_v2":
                arguments[0]._obj.value = 8 << 30
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7}[arguments[1]]
            else:
                arguments[0]._obj.value = numbers[name]
            return 0

        return call


def test_the_driver_is_asked_without_any_package(monkeypatch):
    monkeypatch.setattr(gpu_info.ctypes, "CDLL", lambda name: Cuda())
    monkeypatch.setattr(gpu_info, "_own_version", lambda: "540.4.0")
    driver = gpu_info.find_driver()
    assert driver == Driver((12, 6), "540.4.0", (Gpu("GPU 0", 87, 8 << 30), Gpu("GPU 1", 87, 8 << 30, 1)))
    monkeypatch.setattr(Cuda, "silent", (0,))
    driver = gpu_info.find_driver()
    assert driver.gpus == (Gpu("GPU 1", 87, 8 << 30, 1),)
    assert (driver.gpu(0), driver.gpu(1)) == (None, driver.gpus[0])
    monkeypatch.setattr(Cuda, "init", 100)
    assert gpu_info.find_driver() == Driver((12, 6), "540.4.0", (), 100)

    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(gpu_info.ctypes, "CDLL", no_library)
    assert gpu_info.find_driver() is None


def test_a_driver_that_is_not_there_is_an_error_of_the_environment(monkeypatch):
    """What cuda-bindings 12 and 13 raise when they find no libcuda."""

    def missing(*_):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(cuInit=missing))
    cuda_driver.driver.cache_clear()
    with pytest.raises(MissingDependency, match="cuInit: Failed to dlopen libcuda.so.1") as caught:
        cuda_driver.call("cuInit", 0)
    assert "driver" in str(caught.value.hint)
    cuda_driver.driver.cache_clear()


def test_importing_the_backend_needs_nothing(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] in ("tensorrt", "tensorrt_rtx", "cuda"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [
        each
        for each in sys.modules
        if each.startswith(("moiie_runtime.backends.tensorrt", "moiie_runtime.backends.cuda"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    import moiie_runtime.backends.tensorrt

    assert moiie_runtime.backends.tensorrt.prepare


def test_a_library_that_was_imported_too_early_is_an_error(monkeypatch, tmp_path):
    (tmp_path / tensorrt_library.PARSER).touch()
    monkeypatch.setattr(tensorrt_library, "_libraries", lambda: tmp_path)
    monkeypatch.setattr(tensorrt_library._State, "links", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", object())
    with pytest.raises(MissingDependency, match="was imported before moiie could prepare it"):
        tensorrt_library.load_library("tensorrt_rtx")


def test_engine_json_keeps_what_the_target_asked_for(engine_bundle):
    document = json.loads((engine_bundle / "engines" / "small" / "engine.json").read_text(encoding="utf-8"))
    assert document["settings"]["residency"] == "after_prefill"
