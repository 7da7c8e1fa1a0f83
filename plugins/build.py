"""Building the plugin library: kernels for a list of GPUs, then the C++ shell around them (`moiie plugins build`)."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_export.disk import copy_file, flush, lock, write_bytes, write_errors, write_json
from moiie_plugins.embed import table_text
from moiie_plugins.headers import Headers, find_headers
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.strict_files import sha256_file

if TYPE_CHECKING:
    from moiie_plugins.compile import Selection

log = logging.getLogger(__name__)

LIBRARY = "libmoiie_plugins.so"
MANIFEST = "libmoiie_plugins.json"
TABLE_TEXT = "launch_table.txt"
WORK = "build"
"""Folder in OUT that keeps compiled kernels and objects for the next time; it may be removed."""
SMS = (80, 86, 87, 89, 90, 100, 110, 120)
"""Compute capabilities of a library that is to run everywhere: Ampere, Orin, Ada, Hopper, Blackwell, Thor."""

_SOURCES = Path(__file__).parent
_TAIL = 12
"""Lines of a compiler's complaint that an error shows."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """A finished library.

    Attributes:
        library: the shared object.
        manifest: the JSON file beside it.
        facts: what the manifest says.
    """

    library: Path
    manifest: Path
    facts: Mapping[str, Any]


def build_library(
    out: Path, sms: Sequence[int] = SMS, select: Selection | None = None, progress: Progress | None = None
) -> Built:
    """Compile kernels and C++ into OUT/libmoiie_plugins.so, with a manifest beside it.

    An older library of that name is replaced at the end, and stays what it is when anything fails before.

    Args:
        out: a directory, made when it is not there.
        sms: compute capabilities, 87 for 8.7.
        select: a part of the kernels, for tests; all of them unless given.
        progress: called with a stage's name, steps done and steps in all.

    Raises:
        MissingDependency: Triton, CMake, a C++ compiler or TensorRT's headers are missing, or kernels for an SM.
        MoiieError: a compiler refuses, or OUT cannot be written.
    """
    from moiie_plugins.compile import check_sms

    check_sms(sms)
    headers = find_headers()
    _check_tools()
    with write_errors(out):
        work = out / WORK
        work.mkdir(parents=True, exist_ok=True)
        with lock(out / f"{LIBRARY}.lock", f"{out}: another process is building here"):
            table = compile_for(work, sms, select, progress)
            if progress is not None:
                progress("C++", 0, 1)
            library = compile_shell(work, headers)
            return _publish(library, _facts(table, headers, library), out)


def compile_for(
    folder: Path, sms: Sequence[int], select: Selection | None = None, progress: Progress | None = None
) -> Mapping[str, Any]:
    """Compile the kernels into a folder: images and launch table, also in the form that C++ reads.

    Raises:
        MissingDependency: Triton is not installed, or there are no kernels for an SM.
        MoiieError: a kernel does not fit its GPU.
    """
    from moiie_plugins.compile import compile_kernels

    report = None if progress is None else (lambda done, total, _: progress("kernels", done, total))
    table = compile_kernels(folder, sms, select=select, progress=report)
    write_bytes(folder / TABLE_TEXT, table_text(table).encode())
    return table


def compile_shell(folder: Path, headers: Headers, sanitize: bool = False) -> Path:
    """The library of the kernels in a folder, compiled below it.

    Args:
        folder: what `compile_for` filled.
        headers: TensorRT's.
        sanitize: with the address and undefined-behaviour sanitizers.

    Raises:
        MoiieError: the C++ compiler refuses; with the end of what it says.
    """
    target = folder / ("build-sanitize" if sanitize else "build")
    settings = {
        "MOIIE_KERNELS": str(folder.resolve()),
        "TENSORRT_INCLUDE_DIR": str(headers.path),
        "MOIIE_SANITIZE": "ON" if sanitize else "OFF",
        **({"CMAKE_BUILD_TYPE": "None"} if sanitize else {}),  # not optimised: that takes most of the time
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    (target / "CMakeCache.txt").unlink(missing_ok=True)  # it may be of another checkout
    _run(["cmake", "-S", str(_SOURCES), "-B", str(target), *defined])
    _run(["cmake", "--build", str(target)])
    return target / LIBRARY


def _check_tools() -> None:
    if shutil.which("cmake") is None:
        raise MissingDependency("cmake is not on the PATH", "apt-get install cmake, or: pip install cmake")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise MissingDependency("there is no C++ compiler on the PATH (c++, g++ or clang++)", "apt-get install g++")
    if not any(shutil.which(name) for name in ("make", "gmake", "ninja")):
        raise MissingDependency("neither make nor ninja is on the PATH", "apt-get install make, or: pip install ninja")


def _run(command: Sequence[str]) -> None:
    log.info("%s", " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        problem = next((line for line in said if "error:" in line or "CMake Error" in line), said[-1] if said else "")
        log.info("%s", "\n".join(said[-_TAIL:]))
        raise MoiieError(
            f"{command[0]} failed ({done.returncode}): {problem.strip()}",
            "run again with -v for everything it said; a compiler for C++17 is needed (g++ 9 or newer)",
        )


def _facts(table: Mapping[str, Any], headers: Headers, library: Path) -> dict[str, Any]:
    versions: dict[str, list[str]] = {}
    for kernel in table["kernels"].values():
        for image in kernel["images"]:
            name = str(image["sm"]) if image["kind"] == "cubin" else f"{image['sm']} ptx"
            number = divmod(int(image["ptx_version"]), 10)
            versions.setdefault(name, []).append(f"{number[0]}.{number[1]}")
    return {
        "schema": 1,
        "tool": version("moiie-export"),
        "library": {"file": LIBRARY, "sha256": sha256_file(library), "bytes": library.stat().st_size},
        "sms": sorted(int(sm) for sm in table["sms"]),
        "ptx_isa": {name: sorted(set(found)) for name, found in sorted(versions.items())},
        "tensorrt_headers": {"version": headers.version, "origin": headers.origin},
        "kernels": {"source": table["source"], "triton": table["triton"], "count": len(table["kernels"])},
        "ops": sorted({plan["op"] for plan in table["plans"]}),
    }


def _publish(library: Path, facts: Mapping[str, Any], out: Path) -> Built:
    """Give library and manifest their names, the manifest last: its sha256 tells a library that is not its own."""
    target = out / LIBRARY
    fresh = out / f"{LIBRARY}.tmp"
    copy_file(library, fresh)
    fresh.replace(target)
    write_json(out / MANIFEST, facts)
    flush(out)
    return Built(target, out / MANIFEST, facts)
