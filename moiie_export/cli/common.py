"""What every verb shares: streams, exit codes, error texts, logging and option types."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from moiie_runtime.errors import MoiieError

Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = 130
_STATE = {"verbosity": 0}


def run_guarded(command: click.Command, arguments: list[str]) -> int:
    """Run a click command and turn whatever it raises into an exit code and a message on stderr."""
    _STATE["verbosity"] = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = command.main(arguments, prog_name="moiie", standalone_mode=False, auto_envvar_prefix="MOIIE")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):  # click turns the first, within a verb, into the second
        return _broken_pipe()
    except (KeyboardInterrupt, click.Abort):
        say_error("interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        return _usage(error)
    except Exception as error:  # the one place where anything unforeseen ends
        return _failure(error)


def say_error(message: str, hint: str | None = None) -> None:
    """`error: ...` and, after a blank line, `hint: ...` on stderr."""
    colour = _colour()
    click.echo(click.style("error:", fg="red", bold=True) + f" {message}", err=True, color=colour)
    if hint:
        click.echo("\n" + click.style("hint:", bold=True) + f" {hint}", err=True, color=colour)


def note(message: str = "") -> None:
    """A line for the reader, on stderr."""
    click.echo(message, err=True)


def emit_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a run, on stdout."""
    click.echo(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """`value` as JSON types: paths become text, numpy values numbers or lists, numbers that JSON lacks null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of text with aligned columns; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + "  ".join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)


def debugging() -> bool:
    """Whether tracebacks were asked for: -vv or MOIIE_DEBUG=1."""
    return _STATE["verbosity"] >= 2 or os.environ.get("MOIIE_DEBUG", "") not in ("", "0")


def _colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _verbose(_: click.Context, __: click.Parameter, count: int) -> int:
    _STATE["verbosity"] += count
    level = {0: logging.WARNING, 1: logging.INFO}.get(_STATE["verbosity"], logging.DEBUG)
    named = logging.getLevelName(os.environ.get("MOIIE_LOG", "").upper())
    if isinstance(named, int):
        level = min(level, named)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelFirst("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    for name in ("moiie_export", "moiie_runtime"):
        logging.getLogger(name).setLevel(level)
    logging.getLogger().setLevel(logging.DEBUG if level == logging.DEBUG else logging.WARNING)
    return count


class _LevelFirst(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)


VERBOSE_OPTION = click.option(
    "-v",
    "--verbose",
    count=True,
    expose_value=False,
    callback=_verbose,
    show_default=False,
    help="Say more on stderr; -vv for debugging.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
GPU_OPTION = click.option(
    "--gpu",
    type=click.IntRange(min=0),
    metavar="N",
    help="Which GPU runs a target that was built for one, as `moiie doctor` numbers them.  [default: 0]",
)
BUNDLE_ARGUMENT = click.argument("bundle", type=click.Path(path_type=Path))
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


def byte_size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """Option callback: the bytes that `8GiB`, `500MB` or `4096` means."""
    if text is None:
        return None
    from moiie_runtime.sizes import parse_size

    try:
        return parse_size(int(text) if text.isdecimal() else text)
    except (MoiieError, ValueError) as error:
        raise click.BadParameter(f"{text!r} is no size; write for example 8GiB, 500MB or 4096") from error


def memory_limit_option(help_text: str) -> Callable[[Command], Command]:
    """`--memory-limit SIZE`: bytes, or None when it is not given."""
    return click.option("--memory-limit", callback=byte_size, metavar="SIZE", help=help_text)


def _usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "moiie"
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        note(context.get_help() + "\n")
        say_error("say what to do: a verb is missing", f"`{path} --help` lists the verbs")
    else:
        message = error.format_message().rstrip(".")
        say_error(message[:1].lower() + message[1:], f"`{path} --help` shows the options and an example")
    return error.exit_code if isinstance(error, click.UsageError) else 1


def _failure(error: Exception) -> int:
    if debugging():
        traceback.print_exception(error)
    if isinstance(error, MoiieError):
        say_error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        say_error(f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}", _OS_HINT)
    elif isinstance(error, MemoryError):
        say_error("out of memory", "`moiie run --memory-limit` refuses what does not fit before anything loads")
    else:
        said = str(error).strip().split("\n")[0]
        say_error(
            f"unforeseen {type(error).__name__}: {said}" if said else f"unforeseen {type(error).__name__}", _BUG_HINT
        )
    return 1


_OS_HINT = "check that the path exists, that it may be read or written, and that the disk is not full"
_BUG_HINT = "this is a bug in moiie; run again with MOIIE_DEBUG=1 for the traceback and report it"


def _broken_pipe() -> int:
    # The interpreter flushes stdout once more on exit; give it somewhere to write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    say_error("standard output was closed before everything was written")
    return 1
