"""Workspaces whose process is killed: before every single step that changes the file system, and many times in a row."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_export.stages import Workspace
from tests.trivial_pipeline import Pipeline, assert_complete, finished, silent, tree

STEPS = ("mkdir", "open", "replace", "rename", "link", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """The process is gone; `finally` blocks still run here, but cannot change anything."""


class Killer:
    """Kills the process before step `at`: that step and every later one that would change the file system is refused."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at, self.steps = 0, 0
        for name in STEPS:
            patch.setattr(os, name, self._step(getattr(os, name), name))

    def arm(self, at: int) -> None:
        """Kill before step `at`; 0: never."""
        self.at, self.steps = at, 0

    def _step(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **options)
            self.steps += 1
            if self.at and self.steps >= self.at:
                raise Killed
            return None if name == "fsync" else real(*arguments, **options)

        return step


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killer]:
    killer = Killer(monkeypatch)
    yield killer
    killer.arm(0)


def test_a_kill_between_the_renames_gives_the_old_bundle_back_first(output: Path) -> None:
    Pipeline(output, "old").export()
    output.rename(output.with_name("bundle.replaced"))
    workspace = Workspace.look(output)
    with workspace.locked():
        assert_complete(output)
        assert workspace.plan(Pipeline(output, "old").stages())[1].action == "cached"


def test_a_half_removed_old_bundle_is_not_given_back(output: Path) -> None:
    Pipeline(output, "old").export()
    (output / "onnx" / "graph").unlink()
    output.rename(output.with_name("bundle.replaced"))
    pipeline = Pipeline(output)
    workspace = Workspace.look(output)
    with workspace.locked():
        assert not output.exists()
    pipeline.export()
    assert pipeline.runs == {"graph": 1}
    assert tree(output.parent) == finished("1")


def _begin(output: Path, version: str) -> None:
    """Run all stages, and be killed before anything else."""
    workspace = Workspace.look(output)
    with workspace.locked():
        workspace.execute(Pipeline(output, version).stages(), silent)


def _start(output: Path, kind: str) -> int:
    """Make what lies there before version 1 is exported; how often stages may run until it is finished, with one kill."""
    if kind == "nothing":
        return 3 + 1
    if kind == "only the rename is missing":
        Pipeline(output, "1").export()
        output.rename(output.with_name("bundle.partial"))
        return 0
    if kind == "a change was given up":
        Pipeline(output, "1").export()
        _begin(output, "3")
        return 0
    Pipeline(output, "2").export()
    if kind == "an old bundle and another change":
        _begin(output, "3")
    return 1 + 1


STARTS = (
    "nothing",
    "only the rename is missing",
    "a change was given up",
    "an old bundle",
    "an old bundle and another change",
)


@pytest.mark.parametrize("start", STARTS)
def test_a_kill_before_any_step_loses_nothing(tmp_path: Path, killer: Killer, start: str) -> None:
    for step in range(1, 1000):
        output = tmp_path / str(step) / "bundle"
        output.parent.mkdir()
        most = _start(output, start)
        replacing = output.exists()
        first, second = Pipeline(output, "1"), Pipeline(output, "1")
        survived = not _killed(first, killer, step)
        _check_what_a_kill_left(output, replacing)
        second.export()
        assert tree(output.parent) == finished("1"), step
        assert_complete(output)
        runs = first.runs + second.runs
        assert sum(runs.values()) <= most, f"killed before step {step}: {first.runs}, then {second.runs}"
        if survived:
            assert step > 10  # the loop went through a whole export
            return
    raise AssertionError("an export of three tiny files took 1000 steps")


@pytest.mark.parametrize("start", STARTS)
def test_kills_in_a_row_lose_nothing(tmp_path: Path, killer: Killer, start: str) -> None:
    seeded = random.Random(start)
    for number in range(15):
        output = tmp_path / str(number) / "bundle"
        output.parent.mkdir()
        _start(output, start)
        replacing = output.exists()
        for _ in range(6):
            _killed(Pipeline(output, "1"), killer, seeded.randint(1, 60))
            _check_what_a_kill_left(output, replacing)
        Pipeline(output, "1").export()
        assert tree(output.parent) == finished("1")


def _killed(pipeline: Pipeline, killer: Killer, step: int) -> bool:
    """Export until step `step`; whether the kill came before the end."""
    killer.arm(step)
    try:
        pipeline.export()
    except Killed:
        return True
    finally:
        killer.arm(0)
    return False


def _check_what_a_kill_left(output: Path, replacing: bool) -> None:
    if output.exists():
        assert_complete(output)
    elif replacing:  # killed between the two renames
        assert_complete(output.with_name("bundle.replaced"))
