"""`moiie doctor`: what it finds wrong, with the exit code that a script needs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moiie_export.cli import environment
from tests.cli.conftest import Moiie


def test_a_sound_environment(moiie: Moiie) -> None:
    result = moiie("doctor")
    assert (result.code, result.err) == (0, "everything that a run needs is here\n")
    findings = {each["name"]: each for each in moiie("doctor", "--json").document["findings"]}
    assert {"python", "platform", "cores", "memory", "numpy", "onnxruntime", "export"} <= set(findings)
    assert "CPUExecutionProvider" in findings["onnxruntime"]["detail"]


def test_both_onnxruntimes_fail(moiie: Moiie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda _: "1.30.0")
    result = moiie("doctor")
    assert result.code == 4
    assert "onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are both installed" in result.error
    assert "pip uninstall" in result.hint
    assert moiie("doctor", "--json").document["ok"] is False


def test_a_missing_backend_fails(moiie: Moiie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = moiie("doctor")
    assert result.code == 4
    assert "onnxruntime: cannot be imported" in result.error
    assert "pip install 'moiie-export[cpu]'" in result.hint


def test_an_old_backend_fails(moiie: Moiie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    result = moiie("doctor")
    assert result.code == 4
    assert "a bundle needs at least 1.23" in result.error


def test_a_missing_export_extra_is_only_told(moiie: Moiie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moiie_export.cli.sources.find_spec", lambda name: None if name == "torch" else object())
    result = moiie("doctor")
    assert result.code == 0
    assert (
        "not installed: torch (only `moiie export`, `moiie demo` and `moiie parity --checkpoint` need them)"
        in result.out
    )


def test_a_bundle_that_would_run(moiie: Moiie, golden_bundle: Callable[[str], Path]) -> None:
    result = moiie("doctor", golden_bundle("moiie_phi3"))
    assert result.code == 0
    assert "ok    fits" in result.out


def test_a_bundle_that_does_not_fit(
    moiie: Moiie, golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiie_export.cli.built.available_memory", lambda: 2**20)
    result = moiie("doctor", golden_bundle("moiie_phi3"))
    assert result.code == 4
    assert "fits: portable: a question about one picture takes about" in result.error


def test_a_damaged_bundle_is_no_fault_of_the_environment(
    moiie: Moiie, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(golden_bundle("moiie_phi3"), tmp_path / "b"))
    (bundle / "tokenizer.json").unlink()
    result = moiie("doctor", bundle)
    assert result.code == 3
    assert "tokenizer.json: is missing" in result.error
    assert moiie("doctor", tmp_path / "none").code == 1


def test_available_memory_is_bounded_by_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "/sys/fs/cgroup/memory.max": "4096000\n",
        "/sys/fs/cgroup/memory.current": "96000\n",
    }
    monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
    assert environment.available_memory() == 4_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert environment.available_memory() == 8000 * 1024
    files.clear()
    assert environment.available_memory() is None
