"""What the session for CUDA refuses, and what it does with buffers; on the CPU provider and an emulated device."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from moiie_export.builders import BuildRequest, build
from moiie_export.targets import find_target
from moiie_runtime.backends import onnxruntime_cuda
from moiie_runtime.backends.onnxruntime_cuda import OrtCudaSession, check_release
from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine, open_engine
from moiie_runtime.errors import MissingDependency, MoiieError
from tests.exports import SMALLEST, exported
from tests.host_device import HostDevice, emulate


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    bundle = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("cuda") / "bundle"))
    build(BuildRequest(bundle, find_target("ort-cuda")), lambda *_: None)
    return open_engine(Bundle.open(bundle), "ort-cuda")


@pytest.fixture
def options(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineOptions]:
    emulate(monkeypatch)
    options = engine.options()
    yield options
    options.close()


def opened(engine: Engine, options: EngineOptions, component: str, transient: bool = False) -> OrtCudaSession:
    path = engine.bundle.path(engine.bundle.components[component].file)
    return OrtCudaSession(path, component=component, threads=1, transient=transient, options=options)


def pixels() -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 28, 28), np.float32)}


def test_the_package_for_cpus_is_refused(engine: Engine) -> None:
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    with pytest.raises(MissingDependency, match="is for CPUs only") as caught:
        engine.options()
    assert "must not both be installed" in str(caught.value.hint)


@pytest.mark.parametrize(("installed", "wanted"), [("1.26.2", "1.27"), ("0.99", "1.27"), ("1.9", "1.27")])
def test_a_release_with_another_swiglu_is_refused(installed: str, wanted: str) -> None:
    with pytest.raises(MissingDependency, match=f"needs ONNX Runtime {wanted} or newer, {installed} is installed"):
        check_release({"onnxruntime": wanted}, installed)


@pytest.mark.parametrize("installed", ["1.27.0", "1.31.1", "2.0", "1.100.0rc1"])
def test_newer_releases_are_not(installed: str) -> None:
    check_release({"onnxruntime": "1.27"}, installed)
    check_release({}, "1.0")


def test_a_provider_that_does_not_load_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The dynamic linker's own words say which library is missing."""
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(MissingDependency, match=r"cannot be loaded: .*libonnxruntime_providers_cuda.so") as caught:
        engine.options()
    assert "cuDNN" in str(caught.value.hint)


def test_a_missing_gpu_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))  # no provider library: not Linux
    with pytest.raises(MissingDependency, match="cuda-bindings|driver|GPU|CUDA"):
        engine.options()


def test_it_runs_engines_only(engine: Engine) -> None:
    with pytest.raises(MoiieError, match="what `moiie build --target ort-cuda` made"):
        opened(engine, PORTABLE_OPTIONS, "vision_encoder")


def test_fed_floats_of_any_width_are_rounded_and_buffers_reused(engine: Engine, options: EngineOptions) -> None:
    device = options.device
    assert isinstance(device, HostDevice)
    with opened(engine, options, "vision_encoder") as session:
        feeds = pixels()
        first = session.run(feeds)["image_features"]
        held = dict(device.held)
        assert list(held.values()) == [2 * feeds["pixel_values"].size]
        second = session.run({"pixel_values": feeds["pixel_values"].astype(np.float16)})["image_features"]
        assert device.held == held
        np.testing.assert_array_equal(first, second)
        session.run({"pixel_values": np.concatenate([feeds["pixel_values"]] * 2)})
        assert list(device.held.values()) == [4 * feeds["pixel_values"].size]
    assert not device.held


def test_a_transient_session_holds_nothing_between_runs(engine: Engine, options: EngineOptions) -> None:
    assert isinstance(options.device, HostDevice)
    with opened(engine, options, "vision_encoder", transient=True) as session:
        wanted = session.run(pixels())["image_features"]
        assert not options.device.held
        np.testing.assert_array_equal(session.run(pixels())["image_features"], wanted)


def test_whole_numbers_are_not_rounded(engine: Engine, options: EngineOptions) -> None:
    with (
        opened(engine, options, "decoder_decode") as session,
        pytest.raises(MoiieError, match=r"`past_lengths` must be int64\[batch\], got float32"),
    ):
        session.run({"past_lengths": np.zeros(1, np.float32), "inputs_embeds": np.zeros((1, 1, 32), np.float32)})


def test_only_fitting_buffers_are_bound(engine: Engine, options: EngineOptions) -> None:
    device = options.device
    assert device is not None
    with opened(engine, options, "vision_encoder") as session:
        for buffer in (device.empty((1, 3, 28, 28), "float32", ""), device.empty((1, 3, 28), "float16", "")):
            with pytest.raises(MoiieError, match=r"`pixel_values` must be float16\["):
                session.bind("pixel_values", buffer)
        output = np.zeros((1, 4, 32), np.float16)
        with pytest.raises(MoiieError, match="can only be bound to a buffer of the device"):
            session.bind("image_features", output)


def test_a_bound_host_array_is_copied_once(engine: Engine, options: EngineOptions) -> None:
    assert isinstance(options.device, HostDevice)
    with opened(engine, options, "vision_encoder") as session:
        array = pixels()["pixel_values"]
        session.bind("pixel_values", array)
        wanted = session.run({})["image_features"]
        array[:] = 0  # the copy stays what it was
        np.testing.assert_array_equal(session.run({})["image_features"], wanted)
        session.unbind()
        assert not options.device.held


def test_no_room_is_an_environment_that_lacks_something(engine: Engine, options: EngineOptions) -> None:
    with opened(engine, options, "vision_encoder") as session:
        failed = session._failed(
            RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer of size 9")
        )
        assert isinstance(failed, MissingDependency)
        assert failed.message.endswith("(1.0 GiB of 1.0 GiB are free)")
        assert not isinstance(session._failed(RuntimeError("Invalid dimension")), MissingDependency)


def test_a_provider_that_falls_back_is_refused(
    engine: Engine, options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return ["another"]

    make: Callable[..., Fallen] = lambda *_, **__: Fallen()  # noqa: E731 (a constructor's place)
    monkeypatch.setattr(onnxruntime_cuda.ort, "InferenceSession", make)
    with pytest.raises(MissingDependency, match="cannot use CPUExecutionProvider"):
        opened(engine, options, "vision_encoder")
