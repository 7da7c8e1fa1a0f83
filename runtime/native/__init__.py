"""The CPU operators, compiled on the machine that runs them; a bundle never carries native code.

`library()` gives the file for `SessionOptions.register_custom_ops_library`. It adds the domain `moiie.cpu`: `QLinear` and
`QExperts`, quantised products over weights as `moiie_runtime.native_packing` lays them out (operators.h says what they take).
The library chooses the instructions at run time; MOIIE_CPU_ISA=portable|avx2|avx512|amx makes it take lesser ones.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from moiie_runtime.errors import MissingDependency, MoiieError

# Of packed weights (native_packing.py, layout.h). An engine says which one it has; it rises when the bytes change.
LAYOUT = 1

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
# No flag names a processor: the sources ask for instruction sets function by function. GCC warns of uninitialised values
# inside its own vector intrinsics.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-psabi")


def library() -> Path:
    """The compiled operators; the first call on a machine compiles them, which takes some ten seconds.

    They are kept in `moiie-export` under XDG_CACHE_HOME (~/.cache when it is not set), one file for each state of the
    sources and compiler.

    Raises:
        MissingDependency: there is no C++ compiler.
        MoiieError: the compiler fails, or others may write to the cache.
    """
    compiler = _compiler()
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in {".cpp", ".h"})
    path = _cache() / f"native-{_digest(compiler, sources)}.so"
    if not path.exists():
        _compile(compiler, sources, path)
    return path


def _compiler() -> str:
    for name in _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise MissingDependency(
        f"no C++ compiler for the CPU operators (looked for {', '.join(_COMPILERS)} on PATH)",
        "install one (Debian and Ubuntu: `apt install g++`; macOS: `xcode-select --install`), or run the bundle without "
        "building it for this CPU",
    )


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


def _digest(compiler: str, sources: list[Path]) -> str:
    """Names what the library is made from: sources, flags, compiler, processor family."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout  # noqa: S603 (found on PATH)
    digest = hashlib.sha256(version + repr((_FLAGS, platform.system(), platform.machine())).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    _log.info("compiling the CPU operators with %s", compiler)
    handle, name = tempfile.mkstemp(suffix=".so", prefix="partial-", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    units = [str(source) for source in sources if source.suffix == ".cpp"]
    try:
        done = subprocess.run(  # noqa: S603 (found on PATH)
            [compiler, *_FLAGS, "-o", name, *units], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[:20])
            raise MoiieError(
                f"{compiler} could not compile the CPU operators:\n{lines}", "GCC 11 or Clang 14, or a later one"
            )
        partial.chmod(0o700)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
