"""What lies beside a result: nothing that a killed build left stays, and what another process writes is not touched."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moiie_export import disk
from moiie_export.builders import BuildRequest, BuildResult
from moiie_export.builders.output import finished, reuse, write_output
from moiie_export.targets import BUILT_IN
from moiie_runtime.errors import MoiieError

HEAD = {"fingerprint": "same"}
KILLED = """
import os, signal, sys
from pathlib import Path
from moiie_export.builders import BuildRequest
from moiie_export.builders.output import write_output
from moiie_export.targets import BUILT_IN

def fill(directory):
    (directory / "engine").write_bytes(bytes(1 << 16))
    os.kill(os.getpid(), int(sys.argv[2]))

write_output(BuildRequest(Path(sys.argv[1]), BUILT_IN["cpu"], force=True), {}, 0, fill)
"""


def fill(directory: Path) -> Mapping[str, Any]:
    (directory / "engine").write_bytes(b"whole")
    return {}


@pytest.fixture
def built(tmp_path: Path) -> BuildRequest:
    """A request whose result is there."""
    request = BuildRequest(tmp_path, BUILT_IN["cpu"])
    write_output(request, HEAD, 0, fill)
    return request


def beside(request: BuildRequest) -> list[str]:
    return sorted(path.name for path in request.output.parent.iterdir())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_plain_build_removes_what_a_killed_one_left(built: BuildRequest, end: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(built.bundle), str(int(end))], check=False)
    assert done.returncode == -end
    assert beside(built) == ["cpu", "cpu.lock", "cpu.partial"]
    assert finished(built, HEAD) is not None  # as a dry run asks, which writes nothing
    assert beside(built) == ["cpu", "cpu.lock", "cpu.partial"]
    result = reuse(built, HEAD)
    assert isinstance(result, BuildResult)
    assert result.cached
    assert beside(built) == ["cpu"]


@pytest.mark.parametrize("end", [".partial", ".replaced", ".lock"])
def test_each_thing_that_may_be_left_goes(built: BuildRequest, end: str) -> None:
    left = built.output.with_name(f"cpu{end}")
    for build in (reuse, lambda request, head: write_output(request, head, 0, fill)):
        if end == ".lock":
            left.touch()
        else:
            left.mkdir()
            (left / "engine").write_bytes(b"half")
        assert build(built, HEAD) is not None
        assert beside(built) == ["cpu"]
        assert (built.output / "engine").read_bytes() == b"whole"


def test_force_and_other_settings_reuse_nothing(built: BuildRequest) -> None:
    assert reuse(replace(built, force=True), HEAD) is None
    assert reuse(built, {"fingerprint": "another"}) is None


def test_what_another_process_builds_is_left_alone(built: BuildRequest) -> None:
    """What is there can be used meanwhile; a second build is told to wait, and of no option that it has not got."""
    partial = built.output.with_name("cpu.partial")

    def slow(directory: Path) -> Mapping[str, Any]:
        with pytest.raises(MoiieError, match="another process is building this target") as caught:
            write_output(built, HEAD, 0, fill)
        assert caught.value.hint == "wait for it to finish"
        assert reuse(built, HEAD) is not None
        assert partial.is_dir()
        return fill(directory)

    write_output(built, HEAD, 0, slow)
    assert beside(built) == ["cpu"]


def test_a_result_in_a_folder_that_cannot_be_written_is_used(
    built: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    built.output.with_name("cpu.partial").mkdir()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        patch.setattr("moiie_export.builders.output.finished", lambda *_: BuildResult(built.output, True, 0.0, {}))
        assert reuse(built, HEAD) is not None


def test_no_room_and_no_permission_speak_of_no_other_output(
    built: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MoiieError, match="have to be written") as caught:
        write_output(built, HEAD, 1 << 60, fill)
    assert caught.value.hint == "free some space"

    def refuse(_: Path) -> Mapping[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MoiieError, match="No space left") as caught:
        write_output(built, HEAD, 0, refuse)
    assert caught.value.hint == disk.WRITABLE
    assert beside(built) == ["cpu"]
