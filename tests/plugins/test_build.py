"""`moiie plugins build`: what it writes, and what it says when something is missing."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moiie_export.cli import cli
from moiie_export.cli.common import run_guarded
from moiie_plugins import build
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.strict_files import sha256_file
from tests.plugins.cpp.shell import SM, released, tools


def test_library_and_manifest() -> None:
    built = released()
    facts = json.loads(built.manifest.read_text(encoding="utf-8"))
    assert facts["library"] == {
        "file": "libmoiie_plugins.so",
        "sha256": sha256_file(built.library),
        "bytes": built.library.stat().st_size,
    }
    assert facts["sms"] == [SM]
    assert set(facts["ptx_isa"]) == {str(SM), f"{SM} ptx"}
    assert facts["tensorrt_headers"]["version"] == "10.14.1"
    assert set(facts["ops"]) >= {"ExpertDispatch", "KVCacheUpdate"}
    table = json.loads((tools().folder / "launch_table.json").read_text(encoding="utf-8"))
    assert facts["kernels"] == {"source": table["source"], "triton": table["triton"], "count": len(table["kernels"])}
    assert sorted(path.name for path in built.library.parent.iterdir()) == [
        "build",
        "libmoiie_plugins.json",
        "libmoiie_plugins.so",
    ]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Nothing is compiled: kernels and library are those of the other tests. The SMs that were asked for."""
    asked: list[tuple[int, ...]] = []

    def kernels(folder: Path, sms: tuple[int, ...], *_: object) -> Mapping[str, Any]:
        asked.append(tuple(sms))
        table: Mapping[str, Any] = json.loads((tools().folder / "launch_table.json").read_text(encoding="utf-8"))
        return {**table, "sms": list(sms)}

    def shell(folder: Path, *_: object) -> Path:
        return Path(shutil.copy(released().library, folder))

    monkeypatch.setattr(build, "compile_for", kernels)
    monkeypatch.setattr(build, "compile_shell", shell)
    return asked


def test_command(tmp_path: Path, compiled: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(cli, ["plugins", "build", "--sm", "8.7,89", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'libmoiie_plugins.so'}\n"
    assert run_guarded(cli, ["plugins", "build", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(tmp_path / "libmoiie_plugins.so")
    assert compiled == [(87, 89), build.SMS]
    assert document["sms"] == list(build.SMS)


def test_its_help_names_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(cli, ["plugins", "build", "--help"]) == 0
    assert f"[default: {','.join(map(str, build.SMS))}]" in " ".join(capsys.readouterr().out.split())


def test_wrong_lists_of_sms(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("orin", "0", "00", ",", "87,"):
        assert run_guarded(cli, ["plugins", "build", "--sm", text]) == 2
        assert f"{text!r} is no list of compute capabilities" in capsys.readouterr().err


def test_an_sm_without_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(cli, ["plugins", "build", "--sm", "75,89,99", "--out", str(tmp_path)]) == 4
    said = capsys.readouterr().err
    assert "error: no kernels are made for SM 75, 99" in said
    assert "there are kernels for SM 80, 86, 87" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tools_there", "missing", "hint"),
    [
        ((), "cmake is not on the PATH", "pip install cmake"),
        (("cmake",), "there is no C++ compiler on the PATH", "apt-get install g++"),
        (("cmake", "g++"), "neither make nor ninja is on the PATH", "pip install ninja"),
    ],
)
def test_missing_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools_there: tuple[str, ...], missing: str, hint: str
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in tools_there:
        (folder / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(MissingDependency, match=missing.replace("+", r"\+")) as caught:
        build.build_library(tmp_path / "out")
    assert caught.value.hint is not None
    assert hint in caught.value.hint
    assert caught.value.exit_code == 4


def test_a_failure_leaves_the_old_library(
    tmp_path: Path, compiled: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build_library(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("libmoiie_plugins.*")}
    monkeypatch.undo()
    monkeypatch.setattr(build, "compile_for", lambda *_: {})
    compiler = tmp_path / "bin"
    compiler.mkdir()
    for name in ("cmake", "g++", "make"):
        (compiler / name).write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing'\nexit 2\n", encoding="utf-8")
        (compiler / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(compiler))
    with pytest.raises(MoiieError, match=r"cmake failed \(2\): x\.cpp:1: error: no such thing"):
        build.build_library(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("libmoiie_plugins.*")} == before


def test_two_builds_at_once(tmp_path: Path, compiled: list[tuple[int, ...]]) -> None:
    from moiie_export.disk import lock

    with (
        lock(tmp_path / "libmoiie_plugins.so.lock", "busy"),
        pytest.raises(MoiieError, match="another process is building here"),
    ):
        build.build_library(tmp_path)
