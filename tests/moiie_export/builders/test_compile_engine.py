"""The end of a build, with stand-ins for TensorRT: what a plugin refused is an error even where TensorRT saw none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export.builders.compile_engine import EngineJob, _write
from moiie_plugins import refusals
from moiie_runtime.backends.tensorrt_log import Said
from moiie_runtime.errors import MoiieError

UNSIZED = "ExpertDispatch: input 0 (hidden) has the shape [?, 64], and the profile says no largest one"


def write(folder: Path, plan: bytes | None, said: Said, plugins: Path | None = Path("libmoiie_plugins.so")) -> bytes:
    """The engine that `_write` leaves."""
    job = EngineJob("decoder", folder / "decoder.onnx", folder / "decoder.engine", (), (89,), plugins)
    builder = SimpleNamespace(build_serialized_network=lambda *_: plan)
    config = SimpleNamespace(progress_monitor=None)
    try:
        _write(None, builder, (None, config), job, SimpleNamespace(said=said))
    except MoiieError:
        assert not job.output.exists()
        raise
    return job.output.read_bytes()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugins said; asked for once."""
    sentences: list[str] = []

    def take(_: Path) -> Sequence[str]:
        taken = [*sentences]
        sentences.clear()
        return taken

    monkeypatch.setattr(refusals, "take_refusals", take)
    return sentences


def test_an_engine_that_a_plugin_refused_is_not_kept(tmp_path: Path, refused: list[str]) -> None:
    """TensorRT 10.3 may ask for the size of a workspace without a bound: no error of its own follows."""
    refused.append(UNSIZED)
    with pytest.raises(MoiieError, match="decoder: a plugin refuses the engine") as caught:
        write(tmp_path, b"plan", Said())
    assert UNSIZED in caught.value.message
    assert write(tmp_path, b"plan", Said()) == b"plan"  # those of before are forgotten


def test_a_build_that_fails_says_the_plugins_sentence_first(tmp_path: Path, refused: list[str]) -> None:
    refused.append(UNSIZED)
    said = Said(errors=["Error Code 9: a plugin returned an error"])
    with pytest.raises(MoiieError, match="TensorRT cannot build the engine: ExpertDispatch") as caught:
        write(tmp_path, None, said)
    assert "Error Code 9" in caught.value.message


def test_an_error_that_tensorrt_got_over_is_none(tmp_path: Path, refused: list[str]) -> None:
    assert write(tmp_path, b"plan", Said(errors=["a tactic was skipped"])) == b"plan"


def test_without_the_library_nobody_is_asked(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(refusals, "take_refusals", lambda _: pytest.fail("asked"))
    assert write(tmp_path, b"plan", Said(), None) == b"plan"


def test_what_is_interrupted_leaves_no_file(tmp_path: Path) -> None:
    job = EngineJob("decoder", tmp_path / "decoder.onnx", tmp_path / "decoder.engine", (), (89,))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(None, SimpleNamespace(build_serialized_network=interrupt), (None, None), job, None)
    assert not job.output.exists()
