"""A command as a job: its seconds, its peak of memory with all children, and how quiet the machine was."""

from __future__ import annotations

import os
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.peers.serve import memory
from tests.bench.quiet import foreign_share, usage

ROOT = Path(__file__).parent.parent.parent
_GAP = 0.05  # seconds between two looks


def run_job(command: Sequence[str]) -> dict[str, Any]:
    """Run a command to its end.

    Returns:
        seconds, cpu_seconds, foreign (see quiet.py), peak_anon and peak_file: the most resident bytes of the command
        and its descendants together, and stdout.

    Raises:
        RuntimeError: it failed.
    """
    before = usage(os.getpid())
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process, TreeWatch(process.pid) as watch:
        out, err = process.communicate()
    after = usage(os.getpid())
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}: {err.strip()[-2000:]}")
    return {
        "seconds": after.wall - before.wall,
        "cpu_seconds": after.own - before.own,
        "foreign": foreign_share(before, after, os.cpu_count() or 1),
        **{f"peak_{kind}": size for kind, size in watch.peak.items()},
        "stdout": out,
    }


class TreeWatch:
    """Looks at the memory of a process and its descendants, from a thread, while the block runs."""

    def __init__(self, pid: int) -> None:
        self.peak = {"anon": 0, "file": 0}
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> TreeWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_GAP):
            now = {"anon": 0, "file": 0}
            for pid in descendants(self._pid, parents()):
                for kind, size in _memory(pid).items():
                    now[kind] += size
            self.peak = {kind: max(size, now[kind]) for kind, size in self.peak.items()}


def _memory(pid: int) -> dict[str, int]:
    try:
        return memory(pid)
    except (OSError, KeyError):  # it has ended, or is a zombie without memory
        return {}


def parents() -> dict[int, int]:
    """Each process's parent."""
    found = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    return {pid: parent for pid, parent in found.items() if parent is not None}


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:  # it has ended
        return None


def descendants(pid: int, parent_of: Mapping[int, int]) -> set[int]:
    """A process, its children, their children, and so on."""
    children: dict[int, list[int]] = defaultdict(list)
    for child, parent in parent_of.items():
        children[parent].append(child)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += children[current]
    return found


def forget_pages(paths: Iterable[Path]) -> None:
    """Let the system's cache forget these files, so that the next job reads them from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
