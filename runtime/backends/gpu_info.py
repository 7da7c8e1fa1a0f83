"""The NVIDIA driver and GPUs of this machine, asked without any package: for messages before anything is loaded."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
FIRST_EXACT = 90
"""From here on kernels are compiled for exactly one GPU."""
EMBEDDED = frozenset({72, 87, 101, 110})
"""Systems on a chip: a kernel for another GPU of the same generation is not promised to run there, nor the reverse."""
_VERSION_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: what its maker calls it.
        sm: compute capability times ten, 87 for Orin.
        memory: its bytes in all.
        index: its number for CUDA, which counts those too that do not answer.
    """

    name: str
    sm: int
    memory: int
    index: int = 0


@dataclass(frozen=True)
class Driver:
    """The driver and what it sees.

    Attributes:
        cuda: the newest CUDA release that it runs, (12, 6).
        version: its own, `560.35.03`; None where the system does not say it.
        gpus: those that the process may use and that answer, in the driver's order.
        problem: CUDA's number of what keeps it from being used; 0 for nothing.
    """

    cuda: tuple[int, int]
    version: str | None
    gpus: tuple[Gpu, ...]
    problem: int = 0

    def gpu(self, index: int) -> Gpu | None:
        """The one of this number; None where there is none or it does not answer."""
        return next((each for each in self.gpus if each.index == index), None)


NUMBERS = "`moiie doctor` lists the GPUs with their numbers; CUDA_VISIBLE_DEVICES says which of them a process sees"


def gpus_here(numbers: Sequence[int]) -> str:
    """The GPUs there are to choose from, in words."""
    if len(numbers) < 2:
        return f"there is one, GPU {numbers[0]}" if numbers else "there is none"
    first, last = numbers[0], numbers[-1]
    range_of = f"{first} to {last}" if last - first == len(numbers) - 1 else ", ".join(map(str, numbers))
    return f"there are {len(numbers)}, GPU {range_of}"


def runs_kernels(sm: int, compiled: Iterable[int], portable: Iterable[int] = ()) -> bool:
    """Whether a GPU runs one of these kernels, by the rule of the plugin library (plugins/src/launch_table.cpp).

    Args:
        sm: the GPU's compute capability times ten.
        compiled: those that there are kernels for: it runs its own, and older ones of its generation, but from
            `FIRST_EXACT` on its own only, and on a system on a chip too.
        portable: those whose PTX there is: it runs what is not newer.
    """
    return any(_runs_cubin(each, sm) for each in compiled) or any(each <= sm for each in portable)


def _runs_cubin(compiled: int, sm: int) -> bool:
    older = compiled // 10 == sm // 10 and compiled < sm < FIRST_EXACT
    return compiled == sm or (older and not {compiled, sm} & EMBEDDED)


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
        return Gpu(name.value.decode(errors="replace"), major.value * 10 + minor.value, size.value, index)

    return ask


def _own_version() -> str | None:
    try:
        text = _VERSION_FILE.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, WSL, or hidden in this container
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return None if found is None else found[1]
