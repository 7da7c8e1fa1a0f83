"""The command that makes a built form again as it is: engine.json says what its target's name alone does not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARY = "LIBRARY"
"""What stands for the plugin library's file, which may lie anywhere."""


def build_command(
    root: Path,
    target: str,
    document: Mapping[str, Any],
    *,
    sm: Sequence[int] | None = None,
    plugins: str = LIBRARY,
) -> str:
    """A line for a shell, without `--force`.

    Args:
        root: the bundle's directory.
        target: the form's name.
        document: its engine.json, which may hold anything; empty where it cannot be read.
        sm: GPUs to build for instead of those that it was built for.
        plugins: the plugin library, for a form that has one.
    """
    options = document.get("options")
    options = options if isinstance(options, Mapping) else {}
    recipe, chosen = options.get("recipe"), options.get("sm")
    words = ["moiie", "build", str(root), "--target", target]
    if isinstance(recipe, str) and recipe.isprintable():
        words += ["--recipe", recipe]
    sms = chosen if sm is None and isinstance(chosen, list) else sm
    if sms:
        words += ["--sm", ",".join(map(str, sms))]
    if document.get("plugins"):
        words += ["--plugins", plugins]
    return shlex.join(words)
