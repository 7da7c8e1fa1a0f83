"""Shared libraries compiled on the machine that uses them, once, and kept."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moiie_runtime.errors import MissingDependency, MoiieError

COMPILERS = ("c++", "g++", "clang++")
_SHARED = ("-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden")

_log = logging.getLogger(__name__)


def compiled(name: str, sources: Sequence[Path], flags: Sequence[str], about: str, instead: str = "") -> Path:
    """The library made of these sources; the first call on a machine compiles it.

    It is kept in `moiie-export` under XDG_CACHE_HOME (~/.cache when it is not set), one file for each state of the
    sources, the flags and the compiler.

    Args:
        name: begins the file's name.
        sources: C++ sources and their headers.
        flags: of the compiler, beside those that make a shared library of C++17.
        about: what it is, for messages.
        instead: what to do without it, for the hint.

    Raises:
        MissingDependency: there is no C++ compiler.
        MoiieError: the compiler fails, or others may write to the cache.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MissingDependency(
            f"no C++ compiler for {about} (looked for {', '.join(COMPILERS)} on PATH)",
            "install one (Debian and Ubuntu: `apt install g++`; macOS: `xcode-select --install`)"
            + (f", or {instead}" if instead else ""),
        )
    command = [compiler, *_SHARED, *flags]
    path = _cache() / f"{name}-{_digest(command, sources)}.so"
    if not path.exists():
        _log.info("compiling %s with %s", about, compiler)
        _compile(command, sources, path, about)
    return path


def find_compiler() -> str | None:
    """The C++ compiler on PATH, if there is one."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _cache() -> Path:
    """The folder of compiled libraries, made if need be. Code is loaded from it: nobody else may write there."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "moiie-export"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise MoiieError(f"{folder}: {error.strerror}", "set XDG_CACHE_HOME to a folder you may write to") from error
    foreign = hasattr(os, "getuid") and state.st_uid != os.getuid()
    if foreign or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "belongs to another user" if foreign else "can be written to by other users"
        raise MoiieError(f"{folder} {who}; compiled code is not loaded from there", f"chmod 700 {folder}, or remove it")
    return folder


def _digest(command: Sequence[str], sources: Sequence[Path]) -> str:
    """Names what the library is made from: sources, flags, compiler, processor family.

    The compiler is told by its file, behind all links: running it to ask for its version takes longer than loading.
    """
    real = Path(command[0]).resolve()
    state = real.stat()
    made_by = (str(real), state.st_size, state.st_mtime_ns, command[1:], platform.system(), platform.machine())
    digest = hashlib.sha256(repr(made_by).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: Sequence[str], sources: Sequence[Path], path: Path, about: str) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", prefix="partial-", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    units = [str(source) for source in sources if source.suffix == ".cpp"]
    try:
        done = subprocess.run(  # noqa: S603 (found on PATH)
            [*command, "-o", name, *units], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[:20])
            raise MoiieError(f"{command[0]} could not compile {about}:\n{lines}", "GCC 11 or Clang 14, or a later one")
        partial.chmod(0o700)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
