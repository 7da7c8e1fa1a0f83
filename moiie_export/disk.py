"""Writing so that a killed process, a full disk or a second process never leaves something that looks finished."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moiie_runtime.errors import MoiieError


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, keys sorted."""
    write_bytes(path, json_bytes(data))


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """The text of a JSON file. What UTF-8 cannot hold (a file name that is no text) becomes question marks."""
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "replace")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with write_errors(temporary):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy on a file system without hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        flush(target)


def flush(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(directory: Path, last: Sequence[str]) -> None:
    """Remove a directory with everything in it, the files `last` at the very end: a half-removed one still has them."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name in last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    directory.rmdir()


@contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """Turn the system's refusals into errors that name the file."""
    try:
        yield
    except BrokenPipeError:  # of a progress report, not of a file
        raise
    except OSError as error:
        raise MoiieError(
            f"{error.filename or where}: cannot be written: {error.strerror or error}",
            "check the folder's permissions and the free space, or choose another -o",
        ) from error


@contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on a file made for it and removed afterwards; the system drops that of a killed process.

    Args:
        path: the lock file.
        busy: what the error says when another process holds it.

    Raises:
        MoiieError: another process holds it, or the file system has no locks.
    """
    with _locked_file(path, busy):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _locked_file(path: Path, busy: str) -> Iterator[None]:
    """Open and lock until the locked file is the one of that name: its last owner may just have removed it."""
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MoiieError(busy, "wait for it to finish, or choose another -o") from error
            except OSError as error:
                raise MoiieError(
                    f"{path}: cannot be locked: {error.strerror or error}",
                    "this file system has no locks: write to a local disk and copy the bundle",
                ) from error
            if _is_same_file(file.fileno(), path):
                yield
                return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
