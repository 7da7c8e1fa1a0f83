"""Whether a sample was taken on a quiet machine: how much of it processes other than the measured one used meanwhile."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

FOREIGN_LIMIT = 0.06
"""Samples during which others used more than this share of all CPUs are dropped."""

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Seconds on three clocks: the wall's, all CPUs' busy time, and the CPU time of the measured processes."""

    wall: float
    busy: float
    own: float


def usage(*pids: int) -> Usage:
    """The clocks now; `pids` are the measured processes, whose finished children count as theirs."""
    own = sum(process_seconds(Path(f"/proc/{pid}/stat").read_text()) for pid in pids)
    return Usage(time.monotonic(), busy_seconds(), own)


def foreign_share(before: Usage, after: Usage, cpus: int) -> float:
    """Share of `cpus` that others used between two readings, 0 to 1; time stolen by the host counts as theirs."""
    seconds = after.wall - before.wall
    if seconds <= 0:
        raise ValueError("two readings of the clocks need time between them")
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others) / (seconds * cpus))


def is_quiet(sample: dict[str, float]) -> bool:
    """Whether a sample may be used."""
    return sample["foreign"] <= FOREIGN_LIMIT


def busy_seconds(stat: str | None = None) -> float:
    """CPU seconds that all processes and the host's other guests have used, from the text of /proc/stat."""
    text = Path("/proc/stat").read_text() if stat is None else stat
    fields = [int(field) for field in text.split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle, waiting for a disk
    return (sum(fields) - idle) / _TICKS


def process_seconds(stat: str) -> float:
    """CPU seconds of a process and its finished children, from the text of /proc/PID/stat."""
    fields = stat.rsplit(")", 1)[1].split()  # the command may hold spaces and parentheses
    return sum(map(int, fields[11:15])) / _TICKS
