"""Each engine is built in a process of its own.

TensorRT orders tables in an engine by where its objects lie in memory, so that a second build in one process has other
bytes. In a fresh process they lie alike, if nothing differs that moves them: names of files, the environment, threads
that race, and the lengths of the times that it prints. What goes wrong inside the library cannot take this process with
it, and its memory is given back before the next engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moiie_export.builders.compile_engine import EngineJob, compile_engine
from moiie_export.builders.engine_specs import Profile
from moiie_export.builders.fixed_clock import fixed_clock
from moiie_export.builders.library import load_library, load_plugins
from moiie_runtime.errors import MissingDependency, MoiieError

_log = logging.getLogger(__name__)
_OUTPUT = "engine.partial"
_KEPT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "CUDA_VISIBLE_DEVICES",
    "TENSORRT_LIBRARY_DIR",
)
"""Of the environment; the rest would only shift where objects lie."""
_ADDR_NO_RANDOMIZE, _ASK = 0x0040000, 0xFFFFFFFF
_PR_SET_PDEATHSIG = 1
_MARK = "moiie:"
"""Begins the lines of ours; TensorRT writes to standard output too."""


def run_job(backend: str, job: EngineJob, progress: Callable[[int, int], None]) -> None:
    """As `load_plugins` and `compile_engine`, in another process.

    Args:
        backend: `tensorrt` or `tensorrt_rtx`.
        job: what to build.
        progress: called with steps done and steps in all; what it raises ends the build.

    Raises:
        MoiieError: what the other process raised, or that it was ended by a signal.
    """
    # Neither -m nor the plain -c: both look for modules in the working directory, and its files would matter.
    command = [sys.executable, "-c", f"import sys; del sys.path[0]; from {__name__} import main; main()"]
    # Where objects lie depends on the lengths of names: every build sees the same ones.
    local = replace(
        job,
        graph=Path(job.graph.name),
        output=Path(_OUTPUT),
        plugins=_absolute(job.plugins),
        timing_cache=_absolute(job.timing_cache),
    )
    environment = {name: value for name, value in os.environ.items() if name in _KEPT} | {"PYTHONHASHSEED": "0"}
    if backend == "tensorrt_rtx":  # full TensorRT measures kernels, and needs the time
        environment |= fixed_clock()
    with subprocess.Popen(  # noqa: S603 - this interpreter and this module
        command,
        cwd=job.graph.parent,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"backend": backend, "job": asdict(local)}, default=str))
                process.stdin.close()
            outcome, tail = _listen(process, progress)
        except BaseException:
            process.kill()
            raise
    if outcome is None:
        raise MoiieError(
            f"{job.name}: the process that built the engine ended ({process.returncode}): {tail or 'it said nothing'}",
            "a negative number is a signal: -9 is often the system's answer to too little memory",
        )
    for line in outcome["said"]:
        _log.info("%s", line)
    if outcome["error"] is not None:
        kind = MissingDependency if outcome["exit_code"] == MissingDependency.exit_code else MoiieError
        raise kind(outcome["error"], outcome["hint"])
    (job.graph.parent / _OUTPUT).replace(job.output)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _listen(
    process: subprocess.Popen[str], progress: Callable[[int, int], None]
) -> tuple[Mapping[str, Any] | None, str]:
    """Report progress until the process ends; its outcome, and the last line that was not ours."""
    outcome, tail = None, ""
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith(_MARK):
            tail = line.strip() or tail
            _log.debug("%s", line.rstrip())
            continue
        document = json.loads(line[len(_MARK) :])
        if "done" in document:
            progress(document["done"], document["total"])
        else:
            outcome = document
    return outcome, tail[:300]


def _read_job(document: Mapping[str, Any]) -> EngineJob:
    fields = dict(document)
    for name in ("graph", "output", "plugins", "timing_cache"):
        fields[name] = None if fields[name] is None else Path(fields[name])
    profiles = [
        Profile(each["name"], {dim: tuple(size) for dim, size in each["sizes"].items()}) for each in fields["profiles"]
    ]
    return EngineJob(**{**fields, "profiles": tuple(profiles), "sms": tuple(fields["sms"])})


def _tell(document: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{_MARK}{json.dumps(document)}\n")
    sys.stdout.flush()


def _fix_addresses() -> None:
    """On Linux: start this program again with its memory laid out alike every time; elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        return
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    now = personality(_ASK)
    if now >= 0 and not now & _ADDR_NO_RANDOMIZE and personality(now | _ADDR_NO_RANDOMIZE) >= 0:
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this interpreter and this module


def _end_with_parent() -> None:
    """On Linux: be killed when the process that asked is; there is nobody left for the engine, which takes minutes."""
    if sys.platform.startswith("linux"):
        prctl = ctypes.CDLL(None).prctl
        prctl.argtypes = [ctypes.c_int, ctypes.c_ulong]
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Build the job on standard input."""
    _fix_addresses()
    _end_with_parent()
    document = json.load(sys.stdin)
    outcome: dict[str, Any] = {"error": None, "hint": None, "exit_code": 0, "said": []}
    logging.basicConfig(handlers=[_Keeper(outcome["said"])], level=logging.INFO)
    try:
        library = load_library(document["backend"])
        job = _read_job(document["job"])
        if job.plugins is not None:
            load_plugins(library, job.plugins)
        compile_engine(library, job, lambda done, total: _tell({"done": done, "total": total}))
    except MoiieError as error:
        outcome |= {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    _tell(outcome)


class _Keeper(logging.Handler):
    """Keeps what was logged, for the process that asked."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
