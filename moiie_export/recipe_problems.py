"""What is wrong with a recipe: every problem at once, each with its file, line and key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moiie_runtime.errors import Unsound

_SHOWN = 40
_WIDTH = 300


@dataclass(frozen=True)
class Problem:
    """One finding. `key` is dotted (`export.max_context`), empty when it concerns the file; `line` counts from 1."""

    file: Path
    line: int
    key: str
    text: str
    hint: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.key}: {self.text}" if self.key else f"{self.file}:{self.line}: {self.text}"
        )


class RecipeError(Unsound):
    """A recipe that cannot be used; `problems` holds every finding in order of file and line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            only = self.problems[0]
            super().__init__(str(only), only.hint or _HINT)
            return
        lines = [f"  {problem}" + (f" ({problem.hint})" if problem.hint else "") for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  and {len(self.problems) - _SHOWN} more")
        super().__init__("\n".join([f"{len(self.problems)} problems in the recipe", *lines]), _HINT)


_HINT = "`moiie recipe show default` explains every key"
