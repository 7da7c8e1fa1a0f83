"""Stages with fingerprints: resumable, atomic, killable at any moment.

A bundle is built in `<output>.partial`. A stage writes its files under temporary names, renames them, and then records
its fingerprint with the sha256 of what it wrote; a stage whose fingerprint is already recorded is not run again.
The manifest is written last and the directory renamed to `<output>`, so a directory of that name is always complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object, sha256_file

MANIFEST = "bundle.json"
_STATE = "stages.json"
_LOCK = ".lock"
_STATE_LIMIT = 64 << 20

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in all."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: unique in the pipeline.
        fingerprint: changes whenever the stage would write something else.
        files: paths inside the bundle that it writes.
        run: writes them below the directory it is given and returns notes for the manifest (JSON data).
    """

    name: str
    fingerprint: str
    files: tuple[str, ...]
    run: Callable[[Path, Progress], Mapping[str, Any]]


@dataclass
class StageRecord:
    """What a finished stage left: fingerprint, sha256 and size of its files, notes."""

    fingerprint: str
    files: dict[str, dict[str, Any]]
    notes: dict[str, Any]


@dataclass(frozen=True)
class StagePlan:
    """What would happen to a stage: action `run` or `cached`, and why."""

    name: str
    action: str
    reason: str


@dataclass
class Workspace:
    """The unfinished bundle of one output path, and what is known to be done in it or in the bundle it replaces."""

    output: Path
    records: dict[str, StageRecord] = field(default_factory=dict)
    base: Path | None = None
    """Directory where the files of `records` lie."""

    @property
    def partial(self) -> Path:
        """Where stages write."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def replaced(self) -> Path:
        """Where the old bundle waits for a moment while the new one takes its name."""
        return self.output.with_name(self.output.name + ".replaced")

    @classmethod
    def look(cls, output: Path) -> Workspace:
        """What is already done for this output; nothing is written.

        Raises:
            MoiieError: something that is no bundle lies at the output path.
        """
        workspace = cls(output)
        if output.exists() and not (output / MANIFEST).is_file():
            empty = output.is_dir() and not any(output.iterdir())
            if not empty:
                raise MoiieError(f"{output}: exists and is not a bundle", "choose another -o, or remove it")
        for directory in (workspace.partial, output, workspace.replaced):
            records = _read_records(directory)
            if records:
                workspace.records, workspace.base = records, directory
                return workspace
        return workspace

    def plan(self, stages: Sequence[Stage], force: bool = False) -> list[StagePlan]:
        """What would be run and why."""
        plans = []
        for stage in stages:
            reason = "forced" if force else self._why_run(stage)
            plans.append(StagePlan(stage.name, "run" if reason else "cached", reason or "unchanged"))
        return plans

    def execute(self, stages: Sequence[Stage], progress: Progress, force: bool = False) -> dict[str, StageRecord]:
        """Run what is not done yet inside the partial directory; returns the records of all stages."""
        plans = {plan.name: plan for plan in self.plan(stages, force)}
        self.partial.mkdir(parents=True, exist_ok=True)
        self._adopt([stage for stage in stages if plans[stage.name].action == "cached"])
        for stage in stages:
            if stage.name in self.records:
                continue
            progress(stage.name, 0, 1)
            for file in stage.files:
                (self.partial / file).parent.mkdir(parents=True, exist_ok=True)
            notes = stage.run(self.partial, progress)
            self.records[stage.name] = StageRecord(
                stage.fingerprint, {name: file_record(self.partial / name) for name in stage.files}, dict(notes)
            )
            self._write_state()
            progress(stage.name, 1, 1)
        return self.records

    def finish(self, manifest: Mapping[str, Any], keep: Sequence[str]) -> None:
        """Write the manifest, drop what no stage owns, and give the directory its name."""
        write_json(self.partial / MANIFEST, manifest)
        owned = {self.partial / name for name in keep} | {self.partial / MANIFEST}
        for path in sorted(self.partial.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in owned and path.name != _LOCK:
                path.unlink()
        (self.partial / _LOCK).unlink(missing_ok=True)
        _sync(self.partial)
        if self.output.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.output.rename(self.replaced)
        self.partial.rename(self.output)
        shutil.rmtree(self.replaced, ignore_errors=True)
        _sync(self.output.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second export of the same output away; the system drops the lock of a killed process."""
        import fcntl

        self.partial.mkdir(parents=True, exist_ok=True)
        with (self.partial / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                hint = "wait for it, or choose another -o"
                raise MoiieError(f"{self.partial}: another export is writing here", hint) from error
            yield

    def _why_run(self, stage: Stage) -> str | None:
        record = self.records.get(stage.name)
        if record is None or self.base is None:
            return "not done yet"
        if record.fingerprint != stage.fingerprint:
            return "its inputs changed"
        for name, expected in record.files.items():
            path = self.base / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                return f"{name} is missing or has another size"
        return None

    def _adopt(self, cached: Sequence[Stage]) -> None:
        """Keep what is done: files already in the partial directory stay, those of a finished bundle are linked in."""
        kept = {stage.name: self.records[stage.name] for stage in cached}
        if self.base is not None and self.base != self.partial:
            for record in kept.values():
                for name in record.files:
                    _link(self.base / name, self.partial / name)
        self.records = kept
        (self.partial / MANIFEST).unlink(missing_ok=True)
        self._write_state()

    def _write_state(self) -> None:
        write_json(self.partial / _STATE, {"stages": {name: vars(record) for name, record in self.records.items()}})


def file_record(path: Path) -> dict[str, Any]:
    """sha256 and size of a file, as manifests hold them."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def fingerprint(*parts: Any) -> str:
    """sha256 of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, keys sorted."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_records(directory: Path) -> dict[str, StageRecord]:
    """Records of a partial directory or of a finished bundle; none when it has none or they cannot be read."""
    for name in (_STATE, MANIFEST):
        path = directory / name
        if not path.is_file():
            continue
        try:
            stages = read_json_object(path, _STATE_LIMIT).get("stages", {})
            return {stage: StageRecord(**record) for stage, record in stages.items()}
        except (MoiieError, TypeError, AttributeError):
            continue
    return {}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
