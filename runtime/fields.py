"""Strict reading of a JSON object: every missing or ill-typed key is an error that names the key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import quote, show


class Fields:
    """One JSON object and its place in the document.

    Args:
        data: the parsed object.
        file: name of the document, for messages.
        path: dotted path of this object inside the document, empty at the top.
        hint: what to do about a wrong document.
    """

    def __init__(self, data: Mapping[str, Any], file: str, path: str = "", hint: str | None = None) -> None:
        self.data = data
        self._file = file
        self._path = path
        self._hint = hint

    def error(self, key: str, expected: str) -> MoiieError:
        """An error about `key`: what was expected there and what was found."""
        place = f"{self._path}.{key}" if self._path else key
        if key not in self.data:
            return MoiieError(f"{self._file}: key {quote(place)} is missing (expected {expected})", self._hint)
        return MoiieError(f"{self._file}: {quote(place)} must be {expected}, got {show(self.data[key])}", self._hint)

    def child(self, key: str) -> Fields:
        """The object under `key`."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        path = f"{self._path}.{key}" if self._path else key
        return Fields(value, self._file, path, self._hint)

    def optional_child(self, key: str) -> Fields | None:
        """The object under `key`; None when it is null or missing."""
        return None if self.data.get(key) is None else self.child(key)

    def children(self, key: str) -> dict[str, Fields]:
        """The object of objects under `key`."""
        table = self.child(key)
        return {name: table.child(name) for name in table.data}

    def items(self, key: str) -> Iterator[Fields]:
        """The objects of the list under `key`."""
        for index, value in enumerate(self._list(key, "a list of objects")):
            if not isinstance(value, dict):
                raise self.error(key, "a list of objects")
            path = f"{self._path}.{key}" if self._path else key
            yield Fields(value, self._file, f"{path}[{index}]", self._hint)

    def string(self, key: str, choices: tuple[str, ...] = ()) -> str:
        """The string under `key`, one of `choices` when they are given."""
        value = self.data.get(key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.error(key, " or ".join(f'"{choice}"' for choice in choices) or "a string")
        return value

    def boolean(self, key: str) -> bool:
        """The boolean under `key`."""
        value = self.data.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def integer(self, key: str, minimum: int, maximum: int = 2**63 - 1) -> int:
        """The integer under `key`, within bounds."""
        value = self.data.get(key)
        if not _is_int(value) or not minimum <= value <= maximum:
            bounds = f">= {minimum}" if maximum == 2**63 - 1 else f"from {minimum} to {maximum}"
            raise self.error(key, f"an integer {bounds}")
        return value

    def optional_integer(self, key: str, minimum: int, maximum: int = 2**63 - 1) -> int | None:
        """The integer under `key`; None when it is null or missing."""
        return None if self.data.get(key) is None else self.integer(key, minimum, maximum)

    def integers(self, key: str, minimum: int, maximum: int = 2**63 - 1) -> tuple[int, ...]:
        """The list of integers under `key`, each within bounds."""
        expected = f"a list of integers from {minimum} to {maximum}"
        values = self._list(key, expected)
        if not all(_is_int(value) and minimum <= value <= maximum for value in values):
            raise self.error(key, expected)
        return tuple(values)

    def number(self, key: str) -> float:
        """The finite number under `key`."""
        value = self.data.get(key)
        if not _is_number(value):
            raise self.error(key, "a finite number")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """The list of `length` finite numbers under `key`."""
        expected = f"a list of {length} finite numbers"
        values = self._list(key, expected)
        if len(values) != length or not all(map(_is_number, values)):
            raise self.error(key, expected)
        return tuple(map(float, values))

    def strings(self, key: str) -> tuple[str, ...]:
        """The list of strings under `key`."""
        values = self._list(key, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of strings")
        return tuple(values)

    def _list(self, key: str, expected: str) -> list[Any]:
        value = self.data.get(key)
        if not isinstance(value, list):
            raise self.error(key, expected)
        return value


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
