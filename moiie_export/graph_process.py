"""Graphs traced in another process while this one writes weights.

Tracing a full-size model is some twenty seconds of Python on one core; a thread would take turns with those that write. The
other process writes nothing into the bundle: it sends what it made, and ends when this one does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moiie_export.disk import write_bytes
from moiie_export.graph_stage import write_graph
from moiie_export.model_config import ModelConfig
from moiie_export.quantize.scheme import Scheme
from moiie_export.weights import WeightMap
from moiie_export.weights_stage import WEIGHTS_FILE
from moiie_runtime.errors import MissingDependency, MoiieError, Unsound
from moiie_runtime.tensor_header import Specs, build_header

_KINDS = {kind.exit_code: kind for kind in (MoiieError, MissingDependency, Unsound)}


@dataclass(frozen=True)
class GraphJob:
    """What to trace.

    Attributes:
        names: the graphs.
        config: the model.
        weight_map: as the weights file holds it.
        capacity: tokens of the key-value buffers.
        schemes: weight -> how it is quantised, of those that are.
        specs: of the weights file, which need not be there yet.
    """

    names: tuple[str, ...]
    config: ModelConfig
    weight_map: WeightMap
    capacity: int
    schemes: Mapping[str, Scheme]
    specs: Specs


@dataclass(frozen=True)
class _Outcome:
    """What became of one graph: its bytes and notes, or what went wrong."""

    name: str
    graph: bytes = b""
    notes: Mapping[str, Any] | None = None
    error: str = ""
    hint: str | None = None
    exit_code: int = MoiieError.exit_code
    trace: str = ""


class Tracer:
    """A process that traces; a context manager that starts it and leaves nothing behind.

    Args:
        job: what to trace.

    Attributes:
        names: the graphs it is at.
    """

    def __init__(self, job: GraphJob) -> None:
        self.names = job.names
        self._job = job
        self._found: dict[str, Future[_Outcome]] = {name: Future() for name in job.names}
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Tracer:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, finished or not."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if self._reader is not None:
            self._reader.join()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def check(self) -> None:
        """Raise what went wrong so far, if anything: long work elsewhere need not go on."""
        for found in self._found.values():
            if found.done():
                _require(found.result())

    def write(self, name: str, directory: Path) -> Mapping[str, Any]:
        """Wait for a graph and write it; as `write_graph`."""
        outcome = self._found[name].result()
        notes = _require(outcome)
        write_bytes(directory / "onnx" / f"{name}.onnx", outcome.graph)
        return notes

    def _start(self) -> None:
        paths = [path or str(Path.cwd()) for path in sys.path]
        code = f"import sys; sys.path[:] = {paths!r}; from {__name__} import main; main()"
        said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the reader
        self._process = process = subprocess.Popen(  # noqa: S603 - this interpreter and this module
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # an interrupt from the terminal is for us alone
        )
        self._reader = threading.Thread(target=self._listen, args=(process, said), daemon=True)
        self._reader.start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the reader will say why
            pickle.dump(self._job, process.stdin)
            process.stdin.flush()

    def _listen(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        """Take what a process sends until it ends."""
        assert process.stdout is not None
        with said:
            with contextlib.suppress(Exception):  # its end; what is missing then is said below
                while True:
                    outcome: _Outcome = pickle.load(process.stdout)  # noqa: S301 - from our own process
                    self._found[outcome.name].set_result(outcome)
            missing = [name for name in self.names if not self._found[name].done()]
            said.seek(0)
            tail = said.read().decode(errors="replace").strip().rpartition("\n")[2][:300]
        for name in missing:
            error = f"{name}: the process that traced it ended ({process.wait()}): {tail or 'it said nothing'}"
            hint = "a negative number is a signal: -9 is often the system's answer to too little memory"
            self._found[name].set_result(_Outcome(name, error=error, hint=hint))


def _require(outcome: _Outcome) -> Mapping[str, Any]:
    """The notes of a graph.

    Raises:
        MoiieError: what its process raised.
    """
    if outcome.trace:
        last = outcome.trace.strip().rpartition("\n")[2]
        raise RuntimeError(f"{outcome.name}: {last}") from RuntimeError(outcome.trace)
    if outcome.notes is None:
        raise _KINDS[outcome.exit_code](outcome.error, outcome.hint)
    return outcome.notes


def main() -> None:
    """Trace the job on standard input; outcomes go to standard output, pickled one after the other."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between
    job: GraphJob = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started us
    with tempfile.TemporaryDirectory(prefix="moiie-graphs-") as folder:
        threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
        directory = Path(folder)
        _pretend_weights(directory / WEIGHTS_FILE, job.specs)
        for name in job.names:
            pickle.dump(_traced(name, job, directory), results)
            results.flush()


def _end_with_parent(folder: str) -> None:
    """Standard input ends when the process that started us does, however it ended."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _pretend_weights(path: Path, specs: Specs) -> None:
    """A weights file with its header and holes: graphs point into it, and ONNX's check asks whether it is there."""
    head, header = build_header(path, specs, None)
    path.parent.mkdir()
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(info.nbytes for info in header.values()))


def _traced(name: str, job: GraphJob, directory: Path) -> _Outcome:
    try:
        notes = write_graph(name, job, job.capacity, directory, job.schemes)
        return _Outcome(name, (directory / "onnx" / f"{name}.onnx").read_bytes(), dict(notes))
    except MoiieError as error:
        return _Outcome(name, error=error.message, hint=error.hint, exit_code=error.exit_code)
    except Exception:  # told to the process that asked
        return _Outcome(name, trace=traceback.format_exc())
