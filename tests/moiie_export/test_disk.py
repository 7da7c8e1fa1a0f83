"""Atomic writes and locks."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moiie_export import disk
from moiie_runtime.errors import MoiieError

HOLDER = """
import sys
from pathlib import Path
from moiie_export.disk import lock
with lock(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_json_has_sorted_keys_and_ends_with_a_newline(tmp_path: Path) -> None:
    disk.write_json(tmp_path / "x.json", {"b": 1, "a": ["ä"]})
    assert (tmp_path / "x.json").read_bytes() == '{\n "a": [\n  "ä"\n ],\n "b": 1\n}\n'.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    """A checkpoint directory may be called anything."""
    disk.write_json(tmp_path / "x.json", {"name": os.fsdecode(b"caf\xe9")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "caf?"}


def test_json_that_readers_would_refuse_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        disk.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write_bytes(tmp_path / "x", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoiieError, match=r"x\.tmp: cannot be written: No space left") as caught:
        disk.write_bytes(tmp_path / "x", b"new")
    assert caught.value.hint is not None
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_closed_terminal_is_not_taken_for_a_full_disk() -> None:
    with pytest.raises(BrokenPipeError), disk.write_errors(Path("bundle")):
        raise BrokenPipeError


def test_a_lock_is_dropped_with_its_process_and_its_file_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MoiieError, match="busy"), disk.lock(path, "busy"):
            pass
        holder.send_signal(signal.SIGKILL)
    assert path.exists()
    with disk.lock(path, "busy"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_on_a_removed_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last owner removes the file while it still holds it; who had it open already must start again."""
    path, real, calls = tmp_path / "x.lock", fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with disk.lock(path, "busy"):
        assert path.exists()
        with pytest.raises(MoiieError, match="busy"), disk.lock(path, "busy"):
            pass
    assert len(calls) == 3


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(MoiieError, match="cannot be locked: No locks available"), disk.lock(tmp_path / "l", "busy"):
        pass


def test_a_tree_is_removed_with_its_mark_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    for name in ("a", "z", "mark", "deep/er/f"):
        (tree / name).touch()
    (tree / "link").symlink_to(tmp_path, target_is_directory=True)
    removed: list[str] = []
    real = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path, **how: (removed.append(Path(path).name), real(path, **how)))
    disk.remove_tree(tree, ["mark"])
    assert removed[-1] == "mark"
    assert sorted(removed) == ["a", "f", "link", "mark", "z"]
    assert not any(tmp_path.iterdir())


def test_a_new_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with disk.new_directory(output, needed=10) as directory:
        (directory / "file").write_text("x")
        assert not output.exists()
        with pytest.raises(MoiieError, match="another process is writing here"), disk.new_directory(output):
            pass
    assert (output / "file").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_new_directory_takes_the_place_of_an_empty_one_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with disk.new_directory(Path()) as directory:
        (directory / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(MoiieError, match="exists already"), disk.new_directory(taken):
            pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MoiieError, match="link: exists already"), disk.new_directory(tmp_path / "link"):
        pass


def test_an_error_leaves_nothing_of_a_new_directory(tmp_path: Path) -> None:
    def fail() -> None:
        with disk.new_directory(tmp_path / "out") as directory:
            (directory / "file").touch()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    with pytest.raises(MoiieError, match="bytes have to be written"), disk.new_directory(tmp_path / "out", 1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out.moiie-partial").mkdir()
    (tmp_path / "out.moiie-partial" / "half").touch()
    (tmp_path / "out.lock").touch()
    with disk.new_directory(tmp_path / "out") as directory:
        assert list(directory.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_copies_name_the_side_that_fails(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("x")
    disk.copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "x"
    with pytest.raises(MoiieError, match="gone: no such file"):
        disk.copy_file(tmp_path / "gone", tmp_path / "copy")
    with pytest.raises(MoiieError, match="nowhere/copy: cannot be written"):
        disk.copy_file(tmp_path / "source", tmp_path / "nowhere" / "copy")
