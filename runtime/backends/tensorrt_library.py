"""TensorRT and TensorRT for RTX behind one import: `tensorrt` and `tensorrt_rtx` share their Python API but for a few names."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_runtime.errors import MissingDependency

PARSER, UNVERSIONED, VERSIONED = "libtensorrt_onnxparser_rtx.so.1", "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"
_HINTS = {
    "tensorrt_rtx": "pip install 'moiie-export[tensorrt-rtx]'",
    "tensorrt": "on a Jetson it is the system's TensorRT, of JetPack: apt install python3-libnvinfer, and make the "
    "environment with `python3 -m venv --system-site-packages`; elsewhere: pip install tensorrt",
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        trt: the module.
        name: `tensorrt` or `tensorrt_rtx`.
        version: for example 1.7.1.116.
    """

    trt: Any
    name: str
    version: str

    @property
    def sms(self) -> Mapping[int, Any]:
        """Compute capabilities that it builds for on any machine -> its name for them; empty: only the GPU that is here."""
        kinds = getattr(self.trt, "ComputeCapability", None)
        found = {} if kinds is None else kinds.__members__
        return {int(name[2:]): value for name, value in found.items() if name.startswith("SM")}


def load_library(backend: str) -> Library:
    """The library of a backend, `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingDependency: it is not installed, or cannot be loaded.
    """
    if backend == "tensorrt_rtx":
        _provide_unversioned_name()
    try:
        trt = importlib.import_module(backend)
    except (ImportError, OSError) as error:
        raise MissingDependency(f"{backend} cannot be imported: {error}", _HINTS[backend]) from error
    return Library(trt, backend, str(trt.__version__))


def load_plugins(library: Library, path: Path) -> None:
    """Register the plugins of a shared library, once a process.

    Raises:
        MissingDependency: it cannot be loaded, or registers nothing.
    """
    registry = library.trt.get_plugin_registry()
    try:
        handle = registry.load_library(str(path))
    except Exception as error:
        raise MissingDependency(
            f"{path}: cannot be loaded: {error}", "build it again with `moiie plugins build`"
        ) from error
    if handle is None:
        raise MissingDependency(f"{path}: registers no plugins", "build it again with `moiie plugins build`")


def installed_version(backend: str) -> str | None:
    """The version that would be loaded, found without loading it; None when there is none."""
    from importlib.metadata import distributions

    names = (backend, backend.replace("_", "-"))
    return next((found.version for found in distributions() if found.metadata["Name"] in names), None)


def _provide_unversioned_name() -> None:
    """Let the ONNX parser of TensorRT for RTX find its library when it meets a plugin node.

    It opens `libtensorrt_rtx.so` beside itself then, a name that the wheel does not have, and ends the process when there
    is none. The parser is therefore loaded through a link in a folder of ours where that name exists: the loader takes the
    link's folder for the parser's. site-packages stays as it is, and the libraries are the same files.
    """
    folder = _libraries()
    if folder is None or (folder / UNVERSIONED).exists() or not (folder / PARSER).exists():
        return
    if "tensorrt_rtx" in sys.modules:
        if _State.links is None:
            raise MissingDependency(
                "tensorrt_rtx was imported before moiie could prepare it: plugin nodes would end the process",
                "import tensorrt_rtx after moiie_runtime.backends.tensorrt_library.load_library",
            )
        return
    if _State.links is None:
        links = Path(tempfile.mkdtemp(prefix="moiie-tensorrt-rtx-"))
        atexit.register(shutil.rmtree, links, ignore_errors=True)
        (links / PARSER).symlink_to(folder / PARSER)
        (links / UNVERSIONED).symlink_to(folder / VERSIONED)
        try:
            ctypes.CDLL(str(links / PARSER))
        except OSError as error:
            raise MissingDependency(f"{folder / PARSER} cannot be loaded: {error}", _HINTS["tensorrt_rtx"]) from error
        _State.links = links


class _State:
    """What was done once for this process."""

    links: Path | None = None


def _libraries() -> Path | None:
    """The folder of the wheel's libraries."""
    try:
        found = importlib.util.find_spec("tensorrt_rtx_libs")
    except (ImportError, ValueError):
        return None
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None
