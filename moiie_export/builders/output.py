"""BUNDLE/engines/<target>: written under another name, described by engine.json, renamed when complete."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moiie_export import __version__
from moiie_export.builders import BuildRequest, BuildResult
from moiie_export.disk import WRITABLE, check_space, flush, lock, write_errors, write_json
from moiie_export.stages import file_record, fingerprint
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object

DOCUMENT = "engine.json"
SCHEMA = 1
_LIMIT = 16 << 20


def describe(request: BuildRequest, bundle: Bundle, library: tuple[str, str], code: Any) -> dict[str, Any]:
    """The head of engine.json: what a result is made from and with.

    Args:
        request: gives the target.
        bundle: gives the digests of graphs and weights.
        library: name and version of the backend's library.
        code: JSON data that changes whenever the builder would write something else from the same inputs.

    Returns:
        schema, target, backend, created_by, source (bundle file -> sha256), settings (the target's), options (the
        request's), library, and fingerprint, which is equal when a build would write the same.
    """
    source = {name: record.sha256 for name, record in bundle.files.items() if name.startswith("onnx/")}
    settings = asdict(request.target)
    name, version = library
    return {
        "schema": SCHEMA,
        "target": request.target.name,
        "backend": request.target.backend,
        "created_by": {"tool": "moiie-export", "version": __version__},
        "source": source,
        "settings": settings,
        "options": dict(request.options),
        "library": {"name": name, "version": version},
        "fingerprint": fingerprint(code, source, settings, [name, version]),
    }


def finished(request: BuildRequest, head: Mapping[str, Any]) -> BuildResult | None:
    """The result that is there already and would come out again; None when there is none."""
    try:
        document = read_json_object(request.output / DOCUMENT, _LIMIT)
        files = document["files"]
        same = document["fingerprint"] == head["fingerprint"]
        whole = all(_is_there(request.output / name, entry["bytes"]) for name, entry in files.items())
    except (MoiieError, KeyError, TypeError, AttributeError):
        return None
    return BuildResult(request.output, True, 0.0, files, document) if same and whole else None


def reuse(request: BuildRequest, head: Mapping[str, Any]) -> BuildResult | None:
    """As `finished`, unless the request forces a build; removes what a build that was killed left beside the result."""
    done = None if request.force else finished(request, head)
    if done is not None and any(path.exists() for path in _beside(request.output)):
        # Unless another process builds, or nothing can be written there: what is done can be used all the same.
        with suppress(MoiieError, OSError), _locked(request.output):
            _remove_left(request.output)
    return done


def write_output(
    request: BuildRequest, head: Mapping[str, Any], needed: int, fill: Callable[[Path], Mapping[str, Any]]
) -> BuildResult:
    """Fill a new directory, describe it and give it its name; an older result is replaced then.

    Args:
        request: says where.
        head: of `describe`.
        needed: bytes that will be written.
        fill: writes files into the directory it is given and returns the rest of engine.json.

    Raises:
        MoiieError: another process is building this target, no room, or the system refuses.
    """
    started = time.monotonic()
    output = request.output
    partial, _, _ = _beside(output)
    with write_errors(output, WRITABLE):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            _remove_left(output)
            check_space(output.parent, needed, "free some space")
            partial.mkdir()
            try:
                rest = fill(partial)
                files = _records(partial)
                document = {**head, **rest, "files": files}
                write_json(partial / DOCUMENT, document)
                _take_place(partial, output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return BuildResult(output, False, time.monotonic() - started, files, document)


def _beside(output: Path) -> tuple[Path, Path, Path]:
    """What lies beside a result while it is built: the new one, the old one that it replaces, and the lock."""
    partial, replaced, locked = (output.with_name(output.name + end) for end in (".partial", ".replaced", ".lock"))
    return partial, replaced, locked


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """No other process builds this target meanwhile."""
    with lock(_beside(output)[2], f"{output}: another process is building this target", "wait for it to finish"):
        yield


def _remove_left(output: Path) -> None:
    """What a killed build left; only while the target is locked."""
    for path in _beside(output)[:2]:
        shutil.rmtree(path, ignore_errors=True)


def _records(directory: Path) -> dict[str, Any]:
    """Digest and size of every file below, which is on the disk before anything says so."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in paths:
        flush(path)
    return {path.relative_to(directory).as_posix(): file_record(path) for path in paths}


def _take_place(partial: Path, output: Path) -> None:
    _, replaced, _ = _beside(output)
    flush(partial)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    flush(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size
