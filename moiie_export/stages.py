"""Stages with fingerprints: resumable, atomic, killable at any moment.

A bundle is built in `<output>.partial`. A stage writes its files under temporary names, renames them, and then records
its fingerprint with the sha256 of what it wrote; a stage whose fingerprint is already recorded is not run again.
The manifest is written last and the directory renamed to `<output>`, so a directory of that name is always complete.
A bundle that is replaced waits as `<output>.replaced` between the two renames.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiie_export.disk import flush, json_bytes, link_or_copy, lock, remove_tree, write_errors, write_json
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import parse_json_object, read_json_object, sha256_file

MANIFEST = "bundle.json"
_STATE = "stages.json"
_PARTIAL, _REPLACED, _LOCK = ".partial", ".replaced", ".lock"
_STATE_LIMIT = 64 << 20
_BUNDLE_MARKS = (MANIFEST,)
_PARTIAL_MARKS = (MANIFEST, f"{_STATE}.tmp", _STATE)
"""By one of these files a directory is known to be ours."""

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
    """The unfinished bundle of one output path, and what is known to be done in it or in the bundle it replaces.

    Attributes:
        output: where the bundle will lie, links resolved.
        found: directory -> records of the stages whose files lie in it; the unfinished bundle comes first.
    """

    output: Path
    found: dict[Path, dict[str, StageRecord]] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """Where stages write."""
        return self.output.with_name(self.output.name + _PARTIAL)

    @property
    def replaced(self) -> Path:
        """Where the old bundle waits for a moment while the new one takes its name."""
        return self.output.with_name(self.output.name + _REPLACED)

    @classmethod
    def look(cls, output: Path) -> Workspace:
        """What is already done for this output; nothing is written.

        Raises:
            MoiieError: something that no export wrote lies at the output path, or where the export would work.
        """
        with write_errors(output):
            workspace = cls(Path(os.path.realpath(output)))  # never fails, unlike resolve()
            if workspace.output.suffix in (_PARTIAL, _REPLACED, _LOCK):
                raise MoiieError(f"{output}: names ending in {output.suffix} mark unfinished work", "choose another -o")
            _check_parent(workspace.output)
            _check_owned(workspace.output, _BUNDLE_MARKS, "a bundle")
            _check_owned(workspace.partial, _PARTIAL_MARKS, "an unfinished export")
            _check_owned(workspace.replaced, _BUNDLE_MARKS, "a bundle")
            workspace._read()
        return workspace

    def plan(self, stages: Sequence[Stage], force: bool = False) -> list[StagePlan]:
        """What would be run and why."""
        plans = []
        for stage in stages:
            reason = "forced" if force else None if self._where(stage) else self._why_run(stage)
            plans.append(StagePlan(stage.name, "run" if reason else "cached", reason or "unchanged"))
        return plans

    def notes(self, stage: Stage) -> dict[str, Any] | None:
        """What a stage left for the manifest when it is done; None when it would be run."""
        place = self._where(stage)
        return None if place is None else self.found[place][stage.name].notes

    def finished(self, stages: Sequence[Stage]) -> dict[str, StageRecord] | None:
        """The records of all stages when the bundle at the output path has them; None when one is missing or differs."""
        records = self.found.get(self.output, {})
        usable = all(_problem(stage, records, self.output) is None for stage in stages)
        return {stage.name: records[stage.name] for stage in stages} if usable else None

    def says(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the bundle at the output path has this manifest; keys that others added do not count."""
        path = self.output / MANIFEST
        try:
            old = read_json_object(path, _STATE_LIMIT)
        except MoiieError:
            return False
        new = parse_json_object(json_bytes(manifest), str(path))
        return all(key in old and old[key] == value for key, value in new.items())

    def execute(self, stages: Sequence[Stage], progress: Progress, force: bool = False) -> dict[str, StageRecord]:
        """Run what is not done yet inside the partial directory; returns the records of all stages."""
        with write_errors(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            records = self._adopt([] if force else stages)
            for stage in stages:
                if stage.name in records:
                    continue
                progress(stage.name, 0, 1)
                for name in stage.files:
                    (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                notes = stage.run(self.partial, progress)
                records[stage.name] = StageRecord(stage.fingerprint, self._flushed(stage.files), dict(notes))
                self._write_state(records)
                progress(stage.name, 1, 1)
        return {stage.name: records[stage.name] for stage in stages}

    def finish(self, manifest: Mapping[str, Any], keep: Sequence[str]) -> None:
        """Write the manifest, drop what no stage owns, and give the directory its name."""
        with write_errors(self.output):
            write_json(self.partial / MANIFEST, manifest)
            owned = {self.partial / name for name in keep} | {self.partial / MANIFEST}
            for path in sorted(self.partial.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path not in owned:
                    path.unlink()
            flush(self.partial)
            if self.output.exists():
                self._remove_replaced()
                self.output.rename(self.replaced)
            self.partial.rename(self.output)
            flush(self.output.parent)
            self._remove_replaced()

    def clear(self) -> None:
        """Remove what an export that was killed left beside the finished bundle."""
        with write_errors(self.output):
            if self.partial.exists():
                remove_tree(self.partial, _PARTIAL_MARKS)
            self._remove_replaced()

    @property
    def littered(self) -> bool:
        """Whether there is something to `clear`."""
        return self.partial.exists() or self.replaced.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second export of the same output away, and look again: another one may have finished meanwhile."""
        with write_errors(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            path = self.output.with_name(self.output.name + _LOCK)
            with lock(path, f"{self.output}: another export is writing here"):
                self._restore()
                self._read()
                yield

    def _restore(self) -> None:
        """Give the old bundle its name back when an export was killed just before its own directory took it."""
        records = _read_records(self.replaced)
        whole = bool(records) and all(_missing(record, self.replaced) is None for record in records.values())
        if whole and not self.output.exists():
            self.replaced.rename(self.output)

    def _read(self) -> None:
        directories = (self.partial, self.output, self.replaced)
        self.found = {path: records for path in directories if (records := _read_records(path))}

    def _where(self, stage: Stage) -> Path | None:
        """The directory that holds what this stage would write."""
        return next((path for path, records in self.found.items() if _problem(stage, records, path) is None), None)

    def _why_run(self, stage: Stage) -> str:
        problems = [_problem(stage, records, path) for path, records in self.found.items() if stage.name in records]
        return next((problem for problem in problems if problem), "not done yet")

    def _adopt(self, stages: Sequence[Stage]) -> dict[str, StageRecord]:
        """Keep what is done: files already in the partial directory stay, those of a finished bundle are linked in.

        Records of other content go first, so that no record ever stands beside a file that it does not describe.
        """
        places = {stage.name: path for stage in stages if (path := self._where(stage)) is not None}
        found = {name: self.found[path][name] for name, path in places.items()}
        self._write_state({name: record for name, record in found.items() if places[name] == self.partial})
        (self.partial / MANIFEST).unlink(missing_ok=True)
        for name, record in found.items():
            if places[name] != self.partial:
                for file in record.files:
                    link_or_copy(places[name] / file, self.partial / file)
        self._write_state(found)
        return found

    def _flushed(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records of files that are on the disk before anything says so."""
        for name in names:
            flush(self.partial / name)
        for folder in {(self.partial / name).parent for name in names}:
            flush(folder)
        return {name: file_record(self.partial / name) for name in names}

    def _remove_replaced(self) -> None:
        if self.replaced.exists():
            remove_tree(self.replaced, _BUNDLE_MARKS)

    def _write_state(self, records: Mapping[str, StageRecord]) -> None:
        write_json(self.partial / _STATE, {"stages": {name: vars(record) for name, record in records.items()}})


def file_record(path: Path) -> dict[str, Any]:
    """sha256 and size of a file, as manifests hold them."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def fingerprint(*parts: Any) -> str:
    """sha256 of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _check_parent(output: Path) -> None:
    existing = next(path for path in (*output.parents, Path("/")) if path.exists())
    if not existing.is_dir():
        raise MoiieError(f"{output}: {existing} is no directory", "choose another -o")


def _check_owned(directory: Path, marks: Sequence[str], kind: str) -> None:
    """Refuse a directory that an export would later replace or remove, unless an export made it."""
    if not directory.exists() and not directory.is_symlink():
        return
    plain = directory.is_dir() and not directory.is_symlink()
    if plain and (not any(directory.iterdir()) or any(_is_ours(directory / mark) for mark in marks)):
        return
    raise MoiieError(f"{directory}: exists and is not {kind}", "choose another -o, or move it away")


def _is_ours(path: Path) -> bool:
    """Whether a file is a manifest or a state of ours; many programs write a bundle.json."""
    if path.name != MANIFEST:
        return path.is_file()
    try:
        return isinstance(read_json_object(path, _STATE_LIMIT).get("stages"), dict)
    except MoiieError:
        return False


def _problem(stage: Stage, records: Mapping[str, StageRecord], directory: Path) -> str | None:
    """Why what `directory` holds is not what this stage would write; None when it is."""
    record = records.get(stage.name)
    if record is None:
        return "not done yet"
    if record.fingerprint != stage.fingerprint or set(record.files) != set(stage.files):
        return "its inputs changed"
    return _missing(record, directory)


def _missing(record: StageRecord, directory: Path) -> str | None:
    """Which of a stage's files is not there as it was left; None when all are."""
    for name, expected in record.files.items():
        path = directory / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != expected["bytes"]:
            return f"{name} is missing or has another size"
    return None


def _read_records(directory: Path) -> dict[str, StageRecord]:
    """Records of a partial directory or of a finished bundle; none when it has none or they cannot be read."""
    for name in (_STATE, MANIFEST):
        path = directory / name
        if not path.is_file():
            continue
        try:
            stages = read_json_object(path, _STATE_LIMIT)["stages"]
            return {stage: _parse_record(record) for stage, record in stages.items()}
        except (MoiieError, KeyError, TypeError, AttributeError):
            continue
    return {}


def _parse_record(data: Mapping[str, Any]) -> StageRecord:
    """A record from a file; KeyError, TypeError or AttributeError when it is none."""
    record = StageRecord(data["fingerprint"], dict(data["files"].items()), dict(data["notes"].items()))
    if any(type(entry["bytes"]) is not int or type(entry["sha256"]) is not str for entry in record.files.values()):
        raise TypeError("sizes are numbers and digests are text")
    return record
