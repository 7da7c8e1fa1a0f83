"""On a machine with several GPUs the one that is asked for is used, and one that is not there is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

import moiie_runtime as mr
from moiie_export.cli import main
from moiie_runtime.backends import onnxruntime_cuda, tensorrt_checks
from moiie_runtime.backends.gpu_info import Driver, Gpu
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine, open_engine
from moiie_runtime.errors import MissingDependency, MoiieError

TEXT = [{"role": "user", "content": "Describe."}]


@pytest.fixture
def two(trt, monkeypatch):
    """GPU 0 is one that the engines were not built for."""
    gpus = (Gpu("Old GPU", 75, trt.cuda.total), Gpu("Emulated GPU", 89, trt.cuda.total, 1))
    monkeypatch.setattr(tensorrt_checks, "find_driver", lambda: Driver((13, 0), "580.65.06", gpus))
    trt.cuda.devices = 2
    return trt


def test_the_one_that_is_asked_for_answers(two, engine_bundle):
    with pytest.raises(MissingDependency, match="the GPU here, Old GPU, has SM 75"):
        mr.load(engine_bundle, target="rtx")
    with mr.load(engine_bundle, target="rtx", threads=1, gpu=1) as vlm:
        assert vlm.generate(TEXT, max_new_tokens=2).token_ids
        device = vlm._options.device
        assert (device.index, device.name) == (1, "Emulated GPU (CUDA device 1)")
        assert two.cuda.used_device == 1
    assert not any(two.cuda.left.values())


def test_one_that_is_not_there_is_refused_with_how_many_there_are(two, engine_bundle, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", str(engine_bundle), "--target", "rtx", "--gpu", "2", "-p", "Describe."])
    said = capsys.readouterr().err
    assert ended.value.code == 4
    assert "there is no GPU 2 here: there are 2, GPU 0 to 1" in said
    assert "CUDA_VISIBLE_DEVICES" in said
    with pytest.raises(SystemExit) as ended:
        main(["run", str(engine_bundle), "--target", "rtx", "--gpu", "-1", "-p", "Describe."])
    assert ended.value.code == 2


def test_one_that_does_not_answer_moves_no_other(trt, engine_bundle, monkeypatch):
    """Numbers are CUDA's, which opens the GPU."""
    gpus = (Gpu("Emulated GPU", 89, trt.cuda.total, 1), Gpu("Old GPU", 75, trt.cuda.total, 3))
    monkeypatch.setattr(tensorrt_checks, "find_driver", lambda: Driver((13, 0), "580.65.06", gpus))
    engine = open_engine(Bundle.open(engine_bundle), "rtx")
    engine.on(1).check()
    with pytest.raises(MissingDependency, match="there is no GPU 0 here: there are 2, GPU 1, 3"):
        engine.check()
    with pytest.raises(MissingDependency, match="the GPU here, Old GPU, has SM 75"):
        engine.on(3).check()


@pytest.mark.parametrize("gpu", [-1, True, 0.5, "0"])
def test_no_number_of_a_gpu(two, engine_bundle, gpu):
    with pytest.raises(MoiieError, match="gpu must be an integer of at least 0"):
        mr.load(engine_bundle, target="rtx", gpu=gpu)


def test_what_runs_on_no_gpu_has_none(engine_bundle):
    with pytest.raises(MoiieError, match="gpu: portable is no form that was built for a GPU"):
        mr.load(engine_bundle, gpu=0)
    engine = replace(open_engine(Bundle.open(engine_bundle), "rtx"), target="cpu", backend="onnxruntime")
    with pytest.raises(MoiieError, match="gpu: target cpu was not built for a GPU"):
        engine.on(0)


def test_onnxruntime_is_given_it_too(two, engine_bundle, monkeypatch):
    """Provider, weights and buffers are of the same device."""
    monkeypatch.setattr(onnxruntime_cuda.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "_check_libraries", lambda folder: None)
    found = open_engine(Bundle.open(engine_bundle), "rtx")
    engine = Engine("ort-cuda", "onnxruntime_cuda", found.bundle, {}, None, False, found.portable)
    with pytest.raises(MissingDependency, match="there is no GPU 2 here: there are 2"):
        engine.on(2).options()
    options = engine.on(1).options()
    assert options.device is not None
    assert options.device.index == options.shared.provider.index == 1
    assert options.shared.provider.settings["device_id"] == "1"
    options.close()
    assert not any(two.cuda.left.values())
