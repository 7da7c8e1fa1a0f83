from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from moiie_runtime import native
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.native import compiling


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A library of one function instead of the real one, which takes longer to compile."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text(
        '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'
    )
    monkeypatch.setattr(native, "_SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_it_is_compiled_once(sources, tmp_path, monkeypatch):
    path = native.library()
    assert path.parent == tmp_path / "cache" / "moiie-export"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert ctypes.CDLL(str(path)).answer() == 42
    monkeypatch.setattr(compiling, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.library() == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_other_sources_are_another_library(sources):
    first = native.library()
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    second = native.library()
    assert first != second
    assert (ctypes.CDLL(str(first)).answer(), ctypes.CDLL(str(second)).answer()) == (42, 43)


def test_a_library_is_found_without_running_anything(sources, monkeypatch):
    path = native.library()
    monkeypatch.setattr(compiling.subprocess, "run", lambda *_, **__: pytest.fail("ran something"))
    assert native.library() == path


def test_another_compiler_makes_another_library(sources, tmp_path, monkeypatch):
    first = native.library()
    real = compiling.find_compiler()
    script = tmp_path / "bin" / "c++"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    second = native.library()
    assert second != first
    os.utime(script, ns=(0, 0))  # as an update in its place does
    assert native.library() not in (first, second)


def test_the_cache_is_under_home_without_a_usable_variable(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert native.library().parent == tmp_path / "home" / ".cache" / "moiie-export"


def test_no_compiler(sources, tmp_path, monkeypatch):
    assert native.available()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not native.available()
    with pytest.raises(MissingDependency, match="no C\\+\\+ compiler") as caught:
        native.library()
    assert "apt install g++" in caught.value.hint
    assert "--target portable" in caught.value.hint
    with pytest.raises(MissingDependency, match="for the clock") as caught:
        compiling.compiled("clock", [sources / "answer.cpp"], (), "the clock")
    assert "apt install g++" in caught.value.hint
    assert "target" not in caught.value.hint, "what the operators of a bundle can be replaced by is no help here"


def test_code_that_does_not_compile_leaves_nothing(sources, tmp_path):
    (sources / "answer.cpp").write_text("#error broken on purpose\n")
    with pytest.raises(MoiieError, match="broken on purpose"):
        native.library()
    assert list((tmp_path / "cache" / "moiie-export").iterdir()) == []


def test_a_cache_that_others_may_write_to_is_refused(sources, tmp_path):
    folder = tmp_path / "cache" / "moiie-export"
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    with pytest.raises(MoiieError, match="can be written to by other users"):
        native.library()


def test_a_cache_that_cannot_be_made(sources, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(MoiieError, match="cache"):
        native.library()


def test_a_cache_of_another_user_is_refused(sources, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(MoiieError, match="belongs to another user"):
        native.library()
