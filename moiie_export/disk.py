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
from moiie_runtime.strict_files import open_regular

WRITABLE = "check the folder's permissions and the free space"
"""What to do where the system refuses to write."""


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


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and force the copy to the disk.

    Raises:
        MoiieError: naming the source that cannot be read or the target that cannot be written.
    """
    with open_regular(source) as origin, write_errors(target):
        with target.open("wb") as copy:
            shutil.copyfileobj(origin, copy)
        flush(target)


def check_space(directory: Path, needed: int, hint: str = "free some space, or choose another -o") -> None:
    """Refuse to begin writing `needed` bytes where there is no room for them.

    Args:
        directory: where.
        needed: how many.
        hint: for who has no -o to choose.

    Raises:
        MoiieError: with both numbers.
    """
    with write_errors(directory):
        usage = shutil.disk_usage(directory)
    if usage.total and usage.free < needed:  # a file system that does not know says 0
        raise MoiieError(f"{directory}: {needed} bytes have to be written, {usage.free} are free", hint)


@contextmanager
def new_directory(output: Path, needed: int = 0) -> Iterator[Path]:
    """A directory to fill that gets its name when the block ends without an error, and otherwise vanishes.

    A killed process leaves it under its temporary name; the next run removes it.

    Args:
        output: the name; nothing may be there but an empty directory.
        needed: bytes that will be written.

    Raises:
        MoiieError: something is there, another process is writing it, no room, or the system refuses.
    """
    output = output.absolute()  # "." has no name
    partial = output.with_name(output.name + ".moiie-partial")
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with lock(output.with_name(output.name + ".lock"), f"{output}: another process is writing here"):
            check_absent(output)
            shutil.rmtree(partial, ignore_errors=True)
            check_space(output.parent, needed)
            partial.mkdir()
            try:
                yield partial
                flush(partial)
                if output.exists():
                    output.rmdir()
                partial.rename(output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            flush(output.parent)


def check_absent(output: Path) -> None:
    """Refuse a name that is taken by anything but an empty directory."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise MoiieError(f"{output}: exists already", "choose another -o, or remove it")


def remove_tree(directory: Path, last: Sequence[str]) -> None:
    """Remove a directory with everything in it, the files `last` at the very end: a half-removed one still has them."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name in last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    directory.rmdir()


@contextmanager
def write_errors(where: Path, hint: str = f"{WRITABLE}, or choose another -o") -> Iterator[None]:
    """Turn the system's refusals into errors that name the file, with a hint."""
    try:
        yield
    except BrokenPipeError:  # of a progress report, not of a file
        raise
    except OSError as error:
        raise MoiieError(f"{error.filename or where}: cannot be written: {error.strerror or error}", hint) from error


@contextmanager
def lock(path: Path, busy: str, hint: str = "wait for it to finish, or choose another -o") -> Iterator[None]:
    """Hold an exclusive lock on a file made for it and removed afterwards; the system drops that of a killed process.

    Args:
        path: the lock file.
        busy: what the error says when another process holds it.
        hint: what to do then.

    Raises:
        MoiieError: another process holds it, or the file system has no locks.
    """
    with _locked_file(path, busy, hint):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _locked_file(path: Path, busy: str, hint: str) -> Iterator[None]:
    """Open and lock until the locked file is the one of that name: its last owner may just have removed it."""
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MoiieError(busy, hint) from error
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
