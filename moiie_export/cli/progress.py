"""How far a long step is, for people."""

from __future__ import annotations

import sys
import time

import click

from moiie_export.cli.common import note


class Progress:
    """Stages on stderr: one line that is rewritten on a terminal, else a line a stage and one each ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._stage = ""
        self._said = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `stage` are done."""
        now = time.monotonic()
        new = stage != self._stage
        if not new and now - self._said < (0.1 if self._terminal else 10) and done < total:
            return
        if self._terminal:
            if new:
                self.finish()
            note_line = f"{stage} {done}/{total}" if total > 1 else stage
            click.echo(f"\r\033[K{note_line}", err=True, nl=False)
        elif new:
            note(stage)
        elif done < total:
            note(f"{stage} {done}/{total}")
        self._stage, self._said = stage, now

    def finish(self) -> None:
        """End the line that is being rewritten."""
        if self._terminal and self._stage:
            click.echo("", err=True)
