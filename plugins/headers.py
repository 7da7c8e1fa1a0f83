"""Where TensorRT's C++ headers are: the folder that is told, the system's, or those of a pip package."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from moiie_runtime.errors import MissingDependency

VARIABLE = "TENSORRT_INCLUDE_DIR"
PACKAGE = "kernel-lens"
PACKAGE_VERSION = "2.0.1"
"""The package that carries TensorRT 10.14's headers. Only they are used, at build time, and it is not imported."""

OLDEST = (10, 3)
SYSTEM = (
    Path("/usr/include/aarch64-linux-gnu"),
    Path("/usr/include/x86_64-linux-gnu"),
    Path("/usr/include"),
    Path("/usr/local/tensorrt/include"),
)
"""Debian packages (JetPack's too) and NVIDIA's containers."""

_HEADER = "NvInferRuntime.h"
_HINT = (
    f"install TensorRT's headers (JetPack and Debian: libnvinfer-headers-dev), or set {VARIABLE} to the folder with "
    f"{_HEADER}, or: pip install {PACKAGE}=={PACKAGE_VERSION}"
)


@dataclass(frozen=True)
class Headers:
    """A folder with TensorRT's headers.

    Attributes:
        path: the folder that holds NvInferRuntime.h.
        version: `10.14.1`; that of TensorRT for RTX begins with 1.
        origin: how it was found: the variable's name, `system` or the pip package.
    """

    path: Path
    version: str
    origin: str


def find_headers(environ: dict[str, str] | None = None, system: tuple[Path, ...] = SYSTEM) -> Headers:
    """The headers to compile with: the variable's folder, else the system's, else the pip package's.

    Args:
        environ: environment variables; those of the process unless given.
        system: folders to look into for a system-wide TensorRT.

    Raises:
        MissingDependency: there are none, they are older than TensorRT 10.3, or the variable names another folder.
    """
    told = (os.environ if environ is None else environ).get(VARIABLE, "")
    if told:
        if not (Path(told) / _HEADER).is_file():
            raise MissingDependency(f"{VARIABLE}={told}: there is no {_HEADER} in this folder", _HINT)
        return _checked(Path(told), VARIABLE)
    for folder in system:
        if (folder / _HEADER).is_file():
            return _checked(folder, "system")
    packaged = _packaged()
    if packaged is None:
        raise MissingDependency("TensorRT's C++ headers are not on this machine", _HINT)
    return _checked(packaged, f"{PACKAGE} from pip")


def _packaged() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [folder for each in folders if ((folder := Path(each) / "include" / "tensorrt") / _HEADER).is_file()]
    return found[0] if found else None


def _checked(folder: Path, origin: str) -> Headers:
    try:
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MissingDependency(f"{folder}: NvInferVersion.h cannot be read: {error.strerror}", _HINT) from error
    numbers = [_number(text, part) for part in ("MAJOR", "MINOR", "PATCH")]
    major, minor, patch = (each if each is not None else -1 for each in numbers)
    if -1 in (major, minor, patch):
        raise MissingDependency(f"{folder}/NvInferVersion.h: no version of TensorRT is defined there", _HINT)
    for_rtx = "TRT_MAJOR_RTX" in text
    if not for_rtx and (major, minor) < OLDEST:
        raise MissingDependency(
            f"{folder}: headers of TensorRT {major}.{minor}; the plugins need {OLDEST[0]}.{OLDEST[1]} or newer", _HINT
        )
    return Headers(folder.resolve(), f"{major}.{minor}.{patch}", origin)


def _number(text: str, part: str) -> int | None:
    """A part of the version; newer headers define NV_TENSORRT_MAJOR by way of TRT_MAJOR_ENTERPRISE or TRT_MAJOR_RTX."""
    found = re.search(rf"#define\s+NV_TENSORRT_{part}\s+(\w+)", text)
    value = found.group(1) if found else None
    if value is not None and not value.isdecimal():
        found = re.search(rf"#define\s+{re.escape(value)}\s+(\d+)", text)
        value = found.group(1) if found else None
    return None if value is None else int(value)
