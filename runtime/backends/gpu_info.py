"""The NVIDIA driver and GPUs of this machine, asked without any package: for messages before anything is loaded."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_VERSION_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: what its maker calls it.
        sm: compute capability times ten, 87 for Orin.
        memory: its bytes in all.
    """

    name: str
    sm: int
    memory: int


@dataclass(frozen=True)
class Driver:
    """The driver and what it sees.

    Attributes:
        cuda: the newest CUDA release that it runs, (12, 6).
        version: its own, `560.35.03`; None where the system does not say it.
        gpus: those that the process may use, the first is used.
        problem: CUDA's number of what keeps it from being used; 0 for nothing.
    """

    cuda: tuple[int, int]
    version: str | None
    gpus: tuple[Gpu, ...]
    problem: int = 0


def find_driver() -> Driver | None:
    """The driver of this machine; None when there is none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    release = (number.value // 1000, number.value % 1000 // 10)
    problem = int(cuda.cuInit(0))
    gpus = () if problem else tuple(gpu for gpu in map(_asker(cuda), range(_count(cuda))) if gpu is not None)
    return Driver(release, _own_version(), gpus, problem)


def _count(cuda: Any) -> int:
    count = ctypes.c_int()
    return count.value if cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _asker(cuda: Any) -> Any:
    def ask(index: int) -> Gpu | None:
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
        major, minor = ctypes.c_int(), ctypes.c_int()
        done = (
            cuda.cuDeviceGet(ctypes.byref(device), index),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device),
            cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        )
        if any(done):
            return None
        return Gpu(name.value.decode(errors="replace"), major.value * 10 + minor.value, size.value)

    return ask


def _own_version() -> str | None:
    try:
        text = _VERSION_FILE.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, WSL, or hidden in this container
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return None if found is None else found[1]
