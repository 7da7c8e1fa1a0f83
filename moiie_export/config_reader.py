"""Typed access to a JSON object: every wrong value is an error that names the file and the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from moiie_runtime.errors import MoiieError

_REQUIRED: Any = object()
_MOST = 10_000


class ConfigReader:
    """Reads keys of one parsed JSON object; `where` is the file's name for messages."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where

    def error(self, key: str, expected: str) -> MoiieError:
        """An error for `key` that says what was expected and what was found."""
        return MoiieError(f"{self._where}: {key}: expected {expected}, found {self._raw.get(key)!r}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The raw value; JSON null counts as absent where there is a default."""
        value = self._raw.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise MoiieError(
                f"{self._where}: {key}: missing", f"add {key} to {self._where}; the model has no default for it"
            )
        return default

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int | None = 1) -> int:
        """An integer of at least `minimum`."""
        value = self.get(key, default)
        if type(value) is not int or (minimum is not None and value < minimum):
            raise self.error(key, "an integer" if minimum is None else f"an integer of at least {minimum}")
        return value

    def count(self, key: str) -> int:
        """An integer of at least 1 for what exists one by one, layers and experts, bounded so that they can be listed."""
        value = self.integer(key)
        if value > _MOST:
            raise self.error(key, f"an integer of at most {_MOST}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """An integer of at least 0, or None when absent."""
        return None if self._raw.get(key) is None else self.integer(key, minimum=0)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.error(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def int_list(self, key: str) -> tuple[int, ...]:
        """One integer or a list of them; empty when absent."""
        value = self.get(key, [])
        values = value if isinstance(value, list) else [value]
        if any(type(item) is not int or item < 0 for item in values):
            raise self.error(key, "a token id or a list of them")
        return tuple(values)

    def section(self, key: str) -> ConfigReader:
        """A reader of the object at `key`, whose messages name the key."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigReader(value, f"{self._where}: {key}")

    def sections(self, key: str) -> tuple[ConfigReader, ...]:
        """Readers of the objects in the list at `key`."""
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self.error(key, "a list of objects")
        return tuple(ConfigReader(item, f"{self._where}: {key}[{index}]") for index, item in enumerate(value))

    def only(self, key: str, implemented: Any) -> None:
        """Refuse any value of `key` but the implemented one (or none at all)."""
        value = self._raw.get(key)
        if value is None or value == implemented:
            return
        raise MoiieError(
            f"{self._where}: {key}: {value!r} is not implemented; only {implemented!r} is",
            "a model with this value would be computed wrongly, so it is refused",
        )

    def one_of(self, key: str, implemented: tuple[str, ...]) -> None:
        """Refuse any value of `key` but the implemented ones (or none at all)."""
        value = self._raw.get(key)
        if value is not None and value not in implemented:
            raise MoiieError(f"{self._where}: {key}: {value!r} is not implemented; known: {', '.join(implemented)}")

    def divides(self, key: str, divisor: int, of_key: str, value: int) -> None:
        """Refuse a `divisor` that leaves a remainder."""
        if value % divisor:
            multiple = key if key == str(divisor) else f"{key} = {divisor}"
            raise MoiieError(f"{self._where}: {of_key} = {value} is not a multiple of {multiple}")
