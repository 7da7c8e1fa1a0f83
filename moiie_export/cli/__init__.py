"""The `moiie` command: one file per verb, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from moiie_export.cli.common import CONTEXT, VERBOSE_OPTION, run_guarded

VERBS = (
    "demo",
    "export",
    "run",
    "parity",
    "build",
    "check",
    "inspect",
    "upcycle",
    "convert",
    "recipe",
    "plugins",
    "doctor",
)

EPILOG = """\b
Examples:
  moiie export path/to/checkpoint -o my.bundle
  moiie run my.bundle -i picture.png -p "What is shown in the picture?"
  moiie parity my.bundle --checkpoint path/to/checkpoint

\b
Exit codes: 0 ok, 1 failed, 2 usage, 3 checked and found wanting,
4 the environment lacks something, 130 interrupted.
"""


class LazyGroup(click.Group):
    """A group whose verbs are modules of this package with an attribute `command`."""

    def list_commands(self, _: click.Context) -> list[str]:
        """The verbs, in the order in which they are used."""
        return list(VERBS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now; None when there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"moiie_export.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the closest verb in the error."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            meant = f"did you mean `moiie {close[0]}`?" if close else f"the verbs are {', '.join(VERBS)}"
            raise click.UsageError(f"there is no verb {args[0]!r}; {meant}", ctx)
        return super().resolve_command(ctx, args)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"moiie {version('moiie-export')}")
        ctx.exit()


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings=CONTEXT)
@VERBOSE_OPTION
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Export mixture-of-experts vision-language models to ONNX and run them without PyTorch."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `moiie` script: runs a verb and exits with its code."""
    sys.exit(run_guarded(cli, list(sys.argv[1:] if arguments is None else arguments)))
