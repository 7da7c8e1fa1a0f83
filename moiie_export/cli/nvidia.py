"""What `moiie doctor` says about CUDA and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moiie_export.cli.environment import Finding, installed
from moiie_runtime.backends.gpu_info import Driver, find_driver
from moiie_runtime.backends.tensorrt_library import installed_version
from moiie_runtime.errors import MoiieError
from moiie_runtime.sizes import readable
from moiie_runtime.strict_files import read_json_object

PLUGINS = Path("plugins-build", "libmoiie_plugins.so")
"""Where `moiie plugins build` puts it."""
_PIP = {
    "tensorrt": "on a Jetson the system's, of JetPack; elsewhere pip install tensorrt",
    "tensorrt_rtx": "pip install 'moiie-export[tensorrt-rtx]'",
}


def nvidia_findings() -> Iterator[Finding]:
    """Findings about this machine; nothing is loaded but the driver."""
    driver = find_driver()
    yield from _driver(driver)
    found = {name: version for name in _PIP if (version := installed_version(name)) is not None}
    for name, version in found.items():
        yield Finding(name, "ok", version)
    if not found:
        yield Finding("tensorrt", "info", "not installed", "; ".join(_PIP.values()))
    yield _bindings(driver)
    yield _plugins()


def _driver(driver: Driver | None) -> Iterator[Finding]:
    if driver is None:
        yield Finding("cuda", "info", "no NVIDIA driver: targets for a GPU cannot run here")
        return
    own = f"driver {driver.version}, " if driver.version else ""
    cuda = f"{own}CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    if not driver.gpus:
        reason = f" (CUDA error {driver.problem})" if driver.problem else ""
        yield Finding(
            "cuda", "info", f"{cuda}; it sees no GPU{reason}", "in a container: start it with access to the GPU"
        )
        return
    yield Finding("cuda", "ok", cuda)
    for gpu in driver.gpus:
        yield Finding(f"gpu {gpu.index}", "ok", f"{gpu.name}, SM {gpu.sm}, {readable(gpu.memory)}")


def _bindings(driver: Driver | None) -> Finding:
    version = installed("cuda-bindings")
    if version is None:
        hint = "pip install 'moiie-export[tensorrt]'; with a driver for CUDA 12: pip install 'cuda-bindings<13'"
        return Finding("cuda-bindings", "info", "not installed (engines for a GPU need it)", hint)
    major = version.split(".")[0]
    if driver is not None and major.isdigit() and int(major) > driver.cuda[0]:
        return Finding(
            "cuda-bindings",
            "warn",
            f"{version} needs a driver for CUDA {major}, the one here is for CUDA {driver.cuda[0]}",
            f"pip install 'cuda-bindings=={driver.cuda[0]}.*'",
        )
    return Finding("cuda-bindings", "ok", version)


def _plugins() -> Finding:
    if not PLUGINS.is_file():
        return Finding(
            "tensorrt plugins", "info", f"no {PLUGINS} here (to build engines with plugins)", "moiie plugins build"
        )
    try:
        sms = read_json_object(PLUGINS.with_suffix(".json"), 1 << 20)["sms"]
    except (MoiieError, KeyError):
        return Finding("tensorrt plugins", "info", f"{PLUGINS} without its manifest", "moiie plugins build")
    return Finding("tensorrt plugins", "ok", f"{PLUGINS} for SM {', '.join(map(str, sms))}")
