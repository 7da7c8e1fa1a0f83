"""Whatever a verb raises becomes an exit code and one readable message on stderr."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click
import numpy as np
import pytest

from moiie_export.cli.common import VERBOSE_OPTION, emit_json, plain, run_guarded, table
from moiie_runtime.errors import MissingDependency, MoiieError, Unsound

pytestmark = pytest.mark.usefixtures("logging_restored")


def raising(error: BaseException) -> click.Command:
    @click.command()
    @VERBOSE_OPTION
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MoiieError("it broke", "mend it"), 1, "error: it broke\n\nhint: mend it\n"),
        (MoiieError("it broke"), 1, "error: it broke\n"),
        (Unsound("it is wrong", "mend it"), 3, "error: it is wrong\n\nhint: mend it\n"),
        (MissingDependency("no torch", "pip install torch"), 4, "error: no torch\n\nhint: pip install torch\n"),
        (KeyboardInterrupt(), 130, "\nerror: interrupted\n"),  # below the terminal's ^C
    ],
)
def test_exit_codes_and_texts(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str) -> None:
    assert run_guarded(raising(error), []) == code
    caught = capsys.readouterr()
    assert (caught.out, caught.err) == ("", text)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "x/y"), "error: x/y: no such file or directory\n\nhint: "),
        (MemoryError(), "error: out of memory\n\nhint: "),
        (ValueError("a\nb"), "error: unforeseen ValueError: a\n\nhint: this is a bug"),
        (AssertionError(), "error: unforeseen AssertionError\n\nhint: this is a bug"),
    ],
)
def test_the_unforeseen_is_one_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str], error: Exception, text: str
) -> None:
    assert run_guarded(raising(error), ["-v"]) == 1
    caught = capsys.readouterr()
    assert caught.err.startswith(text)
    assert "Traceback" not in caught.err


@pytest.mark.parametrize(("arguments", "variable"), [(["-vv"], "0"), ([], "1")])
def test_tracebacks_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], variable: str
) -> None:
    monkeypatch.setenv("MOIIE_DEBUG", variable)
    assert run_guarded(raising(MoiieError("it broke")), arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error: it broke\n")


@pytest.mark.parametrize(
    ("arguments", "level"), [([], logging.WARNING), (["-v"], logging.INFO), (["-vv"], logging.DEBUG)]
)
def test_verbosity_sets_the_level_and_logs_to_stderr(
    capsys: pytest.CaptureFixture[str], arguments: list[str], level: int
) -> None:
    @click.command()
    @VERBOSE_OPTION
    def command() -> None:
        logger = logging.getLogger("moiie_runtime.anything")
        for each in (logging.WARNING, logging.INFO, logging.DEBUG):
            logger.log(each, "said at %d", each)

    assert run_guarded(command, arguments) == 0
    caught = capsys.readouterr()
    said = [each for each in (logging.WARNING, logging.INFO, logging.DEBUG) if each >= level]
    assert caught.out == ""
    assert caught.err == "".join(f"{logging.getLevelName(each).lower()}: said at {each}\n" for each in said)


def test_json_is_plain_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"path": Path("a/b"), "ids": np.array([1, 2]), "x": np.float32(0.5), "bad": float("nan"), "é": (1, None)})
    assert json.loads(capsys.readouterr().out) == {"path": "a/b", "ids": [1, 2], "x": 0.5, "bad": None, "é": [1, None]}
    assert plain({3: [True, {"a": float("-inf")}]}) == {"3": [True, {"a": None}]}


def test_table_aligns_all_but_the_last_column() -> None:
    assert table([["a", "bb", "c"], ["aaa", "b", ""]], "  ") == "  a    bb  c\n  aaa  b"
    assert table([]) == ""
