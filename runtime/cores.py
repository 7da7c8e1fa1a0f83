"""How many threads a process should use: one for each physical core that it may run on."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Physical cores this process may use, at least 1.

    Takes the affinity mask, hardware threads that share a core (counted once), and the CPU quota of a container.
    Where the system does not tell which threads share a core, every thread counts.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in cpus})
    quota = _quota()
    return max(1, cores if quota is None else min(cores, quota))


def _siblings(cpu: int) -> str:
    """A text that is the same for all hardware threads of one core."""
    text = _read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    return text or str(cpu)


def _quota() -> int | None:
    """Whole CPUs granted by a version 2 control group; None without a limit."""
    limit, _, period = _read(_CGROUP).partition(" ")
    if not limit.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return max(1, int(limit) // int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # not Linux, or hidden in this container
        return ""
