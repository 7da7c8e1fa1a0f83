"""Engines in processes of their own, stopped while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.quiet import foreign_share, usage

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is started.

    Attributes:
        name: in tables and results.
        module: the module of tests/bench/peers, as `serve.py` names it.
        python: the interpreter that has the engine's packages.
        options: what the module's functions take beside paths.
    """

    name: str
    module: str
    python: str = sys.executable
    options: Mapping[str, Any] = field(default_factory=dict)

    def command(self, verb: str, **arguments: Any) -> list[str]:
        """The command line that serves this engine."""
        text = json.dumps({**self.options, **arguments}, default=str)
        return [self.python, "-m", "tests.bench.peers.serve", self.module, verb, text]

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Run one verb to its end; its answer.

        Raises:
            RuntimeError: it failed; the message is the end of its error output.
        """
        command = self.command(verb, **arguments)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {verb} failed: {done.stderr.strip()[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def missing(self) -> str | None:
        """Why the engine cannot run here; None when it can."""
        try:
            reason: str | None = self.call("check")["missing"]
        except (RuntimeError, OSError) as error:
            return str(error)
        return reason


class Worker:
    """A served engine. Outside of a request its process is stopped, so that no waiting thread of it takes a core."""

    def __init__(self, spec: EngineSpec, path: Path) -> None:
        self.name = spec.name
        command = spec.command("run", path=path)
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = {}
        try:
            self.about = self.ask({"do": "about"})
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            RuntimeError: the engine stopped.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGCONT)
        print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the engine stopped with exit status {process.wait()}")
        process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer of one request, with the share of the CPUs that others used meanwhile as `foreign`."""
        pids = (self.pid, os.getpid())
        before = usage(*pids)
        answer = self.ask({"do": "sample", **request})
        return {**answer, "foreign": foreign_share(before, usage(*pids), os.cpu_count() or 1)}

    def close(self) -> None:
        """End the process. Closing twice is allowed."""
        process = self._process
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def usable(specs: Sequence[EngineSpec]) -> list[EngineSpec]:
    """Those that can run here; says of each other one why not."""
    found = []
    for spec in specs:
        reason = spec.missing()
        if reason is None:
            found.append(spec)
        else:
            print(f"skipped: {spec.name}: {reason}", file=sys.stderr)
    return found
