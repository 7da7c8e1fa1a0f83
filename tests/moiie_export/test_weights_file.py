"""The weight file under construction: what counts after a kill, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moiie_export import disk
from moiie_export.weights_file import WeightsFile
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile

SPECS = {"a": ("F32", (4,)), "b": ("I8", (6, 2))}
A, B = np.arange(4, dtype=np.float32), np.arange(12, dtype=np.int8).reshape(6, 2)


def begun(path: Path, fingerprint: str = "f", steps: int = 3, **options: bool) -> WeightsFile:
    return WeightsFile(path, SPECS, fingerprint, steps, **options)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Two of three steps were done and noted, then the process died."""
    path = tmp_path / "w.safetensors"
    with begun(path) as file:
        file.write("a", 0, A)
        file.write("b", 4, B[2:4])
        file.commit(2, {"b": "note"})
        file.write("b", 0, B[:2])
    return path


def test_any_order_makes_a_safetensors_file(killed: Path) -> None:
    with begun(killed) as file:
        assert (file.done, file.notes, file.complete) == (2, {"b": "note"}, False)
        np.testing.assert_array_equal(file.read("a"), A)
        file.write("b", 8, B[4:])
        file.commit(3, file.notes)
        file.finish()
    with TensorFile(killed) as found:
        np.testing.assert_array_equal(found["a"], A)
        np.testing.assert_array_equal(found["b"], B)


def test_a_file_that_got_its_name_is_whole(killed: Path) -> None:
    """Killed after the rename and before anything else said so."""
    with begun(killed) as file:
        file.commit(3, {})
        file.finish()
    before = killed.stat()
    with begun(killed) as file:
        assert file.complete
    assert killed.stat().st_mtime_ns == before.st_mtime_ns
    killed.write_bytes(b"cut")
    with begun(killed) as file:
        assert (file.complete, file.done) == (False, 0)


@pytest.mark.parametrize(
    "change", ["fingerprint", "steps", "force", "cut", "no file", "no journal", "journal", "number"]
)
def test_what_was_begun_for_something_else_starts_again(killed: Path, change: str) -> None:
    temporary, journal = Path(f"{killed}.tmp"), Path(f"{killed}.journal")
    if change == "cut":
        temporary.write_bytes(temporary.read_bytes()[:-1])
    elif change == "no file":
        temporary.unlink()
    elif change == "no journal":
        journal.unlink()
    elif change == "journal":
        journal.write_text(journal.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    elif change == "number":
        said = json.loads(journal.read_text(encoding="utf-8"))
        journal.write_text(json.dumps({**said, "done": 4}), encoding="utf-8")
    options = {"fingerprint": "g" if change == "fingerprint" else "f", "steps": 4 if change == "steps" else 3}
    with begun(killed, resume=change != "force", **options) as file:  # type: ignore[arg-type]
        assert (file.done, file.notes, file.complete) == (0, {}, False)
        assert not journal.exists(), "it would vouch for what is being written"
        assert not np.any(file.read("a"))


def test_the_journal_never_runs_ahead_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr("moiie_export.weights_file.os.fsync", lambda _: order.append("data"))
    monkeypatch.setattr("moiie_export.weights_file.write_json", lambda *_: order.append("journal"))
    with begun(tmp_path / "w.safetensors") as file:
        order.clear()
        file.commit(1, {})
    assert order == ["data", "journal"]


def test_an_unfinished_file_gets_no_name(killed: Path) -> None:
    with begun(killed) as file, pytest.raises(MoiieError, match="1 of 3 steps were not written"):
        file.finish()
    assert not killed.exists()


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(total=100, used=90, free=10))
    with pytest.raises(MoiieError, match="bytes have to be written, 10 are free"):
        begun(tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
