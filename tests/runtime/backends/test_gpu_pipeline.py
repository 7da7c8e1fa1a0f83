"""The pipeline that tests/gpu runs on a GPU: its steps on emulated ones, and a fault in an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export import builders
from moiie_export.builders import BuildRequest
from moiie_export.parity import decoder_stage
from tests.exports import smallest_with_room
from tests.gpu import pipeline
from tests.gpu.pipeline import Given, pipeline_steps
from tests.host_device import emulate
from tests.runtime.backends import engine_bundle
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt


@pytest.fixture
def built(trt: EmulatedTensorRt, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Builds for the emulation; returns settings that a test may change."""
    settings: dict[str, Any] = {}
    build = builders.build

    def emulated(request: BuildRequest, progress: Any) -> Any:
        target = request.target
        if target.backend == "onnxruntime_cuda":
            return build(request, progress)
        assert (target.sms, target.plugins) == ((89,), "off")
        given = {"like": "rtx", "sms": target.sms, "prefill": target.prefill, "plugins": target.plugins}
        engine_bundle.build(request.bundle, target.name, given | settings, dialect=True)
        return SimpleNamespace(files=[], seconds=0.0)

    monkeypatch.setattr(builders, "build", emulated)
    monkeypatch.setattr(decoder_stage, "KEPT", 2)
    return settings


def outcomes(given: Given) -> dict[str, str]:
    return {step.what: step.outcome for step in pipeline_steps(given)}


def test_every_library_builds_answers_and_is_the_checkpoint(
    built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    monkeypatch.setattr(pipeline, "_importable", lambda name: name != "tensorrt")
    found = outcomes(Given(89, smallest_with_room().bundle, smallest_with_room().checkpoint))
    steps = {f"{name}: {step}" for name in ("tensorrt_rtx", "onnxruntime") for step in ("build", "tokens", "parity")}
    assert set(found) == steps
    assert all(outcome.startswith("ok: ") for outcome in found.values()), found


def test_another_model_fails_and_what_is_missing_does_not(
    built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_importable", lambda name: name == "tensorrt_rtx")
    assert outcomes(Given(89, smallest_with_room().bundle))["tensorrt_rtx: parity"].startswith(
        "not run: name the checkpoint"
    )
    monkeypatch.setattr(pipeline, "_importable", lambda name: name == "onnxruntime")  # the package for CPUs
    (outcome,) = [
        text for what, text in outcomes(Given(89, smallest_with_room().bundle)).items() if "build" not in what
    ]
    assert outcome.startswith("not run: ")
    monkeypatch.setattr(pipeline, "_importable", lambda name: False)
    assert outcomes(Given(89))["pipeline"].startswith("not run: none of tensorrt, ")
