"""The command line in this process, with its streams caught and the logging it configures undone."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from moiie_export.cli import cli
from moiie_export.cli.common import run_guarded
from tests.runtime.backends.conftest import cuda, trt

__all__ = ["cuda", "trt"]


@dataclass(frozen=True)
class Result:
    """What a run of `moiie` left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document it has to be."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The text after `error: `, up to the hint."""
        return self.err.split("error: ", 1)[1].split("\n\nhint: ")[0].strip()

    @property
    def hint(self) -> str:
        """The text after `hint: `."""
        return self.err.split("\n\nhint: ", 1)[1].strip()


Moiie = Callable[..., Result]


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Handlers and levels as they were."""
    root = logging.getLogger()
    loggers = [root, logging.getLogger("moiie_export"), logging.getLogger("moiie_runtime")]
    handlers, levels = list(root.handlers), [each.level for each in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def moiie(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logging_restored: None) -> Moiie:
    """moiie("run", bundle, ...) -> Result. `stdin` is given as bytes."""

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run_guarded(cli, [str(each) for each in arguments])
        caught = capfd.readouterr()
        return Result(code, caught.out, caught.err)

    return run
