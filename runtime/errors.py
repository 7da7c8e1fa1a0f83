"""The errors every part of the toolkit raises: one sentence of what is wrong, one of how to fix it."""

from __future__ import annotations


class MoiieError(Exception):
    """Wrong input or a failed step.

    Args:
        message: what is wrong and where (file, key, tensor, node), what was expected and what was found.
        hint: the command or step that fixes it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message = message
        self.hint = hint


class MissingDependency(MoiieError):
    """The environment lacks a package, a device or memory that the step needs."""

    exit_code = 4


class Unsound(MoiieError):
    """Something was checked and found wanting: a damaged bundle, an invalid recipe, a failed parity."""

    exit_code = 3
