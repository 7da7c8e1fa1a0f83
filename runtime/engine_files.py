"""The files of a bundle's built forms: are they those that engine.json records, and of this export of the bundle?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiie_runtime.build_command import build_command
from moiie_runtime.bundle import Bundle, file_problem
from moiie_runtime.engines import DOCUMENT, ENGINES, built_targets, changed_source, open_engine, read_document
from moiie_runtime.errors import MoiieError
from moiie_runtime.manifest import FileRecord, read_files

_SUFFIXES = {".engine", ".onnx", ".safetensors", ".data", ".bin", ".so"}
"""Of files that a session would read; what a GPU compiled for itself lies beside them, and is its own business."""


@dataclass(frozen=True)
class EngineFiles:
    """What lies in BUNDLE/engines/<target>.

    Attributes:
        target: its name.
        build: the command that makes it again.
        document: engine.json; empty when it cannot be read.
        files: what it lists.
        problems: one line for each file that is missing, has another size or digest, or is not listed, and for a
            document that cannot be used.
        stale: the file of the bundle that it was not built from; None when it belongs to this export.
    """

    target: str
    build: str
    document: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    stale: str | None = None

    @property
    def bytes(self) -> int:
        """Of all files that are listed."""
        return sum(record.bytes for record in self.files.values())


def engine_files(bundle: Bundle, *, read: bool = False) -> list[EngineFiles]:
    """Every built form of a bundle.

    Args:
        bundle: an opened bundle.
        read: read all files and compare their digests; else only their sizes.
    """
    return [_engine_files(bundle, target, read) for target in built_targets(bundle)]


def _engine_files(bundle: Bundle, target: str, read: bool) -> EngineFiles:
    build = build_command(bundle.root, target, {})
    try:
        raw, top = read_document(bundle, target)
        build = build_command(bundle.root, target, raw)
        files = read_files(top)
        problems = list(_problems(bundle, target, files, read))
    except MoiieError as error:
        return EngineFiles(target, build, problems=(error.message,))
    stale = changed_source(bundle, raw)
    if stale is None:
        try:
            open_engine(bundle, target)
        except MoiieError as error:
            problems.append(error.message)
    return EngineFiles(target, build, raw, files, tuple(problems), stale)


def _problems(bundle: Bundle, target: str, files: Mapping[str, FileRecord], read: bool) -> Iterator[str]:
    folder = f"{ENGINES}/{target}"
    for name, record in sorted(files.items()):
        whole = f"{folder}/{name}"
        problem = file_problem(bundle.path(whole), whole, record, DOCUMENT, read=read)
        if problem is not None:
            yield problem
    for path in sorted(Path(bundle.root, folder).rglob("*")):
        name = path.relative_to(bundle.root / folder).as_posix()
        if path.suffix in _SUFFIXES and path.is_file() and name not in files:
            yield f"{folder}/{name}: is not listed in {DOCUMENT}"
