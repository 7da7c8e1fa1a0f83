"""Files from outside, opened, hashed and parsed strictly: nothing is guessed, repaired or read without a limit."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from pathlib import Path
from typing import Any, BinaryIO

from moiie_runtime.errors import MoiieError

INCOMPLETE = "the file is incomplete or damaged: copy or download it again"
_MAX_DIGITS = 100  # keeps int() linear; the longest number seen in practice (model_max_length) has 31


def open_regular(path: Path, hint: str | None = None) -> BinaryIO:
    """Open a regular file (or a link to one) for reading.

    Raises:
        MoiieError: the path is missing, a directory, a pipe or device, or not readable.
    """
    try:
        mode = path.stat().st_mode  # before open: opening a pipe would wait for a writer
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a link to one"
            raise MoiieError(f"{path}: expected a file, found {kind}", hint)
        return path.open("rb")
    except FileNotFoundError:
        detail = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise MoiieError(f"{path}: {detail}", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MoiieError(f"{path}: cannot be opened: {_reason(error)}", hint) from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks of 1 MiB.

    Raises:
        MoiieError: the file cannot be opened or read.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    with open_regular(path) as file:
        try:
            while count := file.readinto(block):  # type: ignore[attr-defined]
                digest.update(block[:count])
        except OSError as error:
            raise MoiieError(f"{path}: cannot be read: {_reason(error)}", INCOMPLETE) from error
    return digest.hexdigest()


def read_json_object(path: Path, limit: int, hint: str | None = None) -> dict[str, Any]:
    """Parse a file that holds one JSON object; see `parse_json_object`.

    Args:
        path: the file.
        limit: its largest allowed size in bytes.
        hint: what to do when the file is missing or wrong.
    """
    with open_regular(path, hint) as file:
        try:
            raw = file.read(limit + 1)
        except OSError as error:
            raise MoiieError(f"{path}: cannot be read: {_reason(error)}", INCOMPLETE) from error
    if len(raw) > limit:
        raise MoiieError(f"{path}: expected at most {limit} bytes of JSON, found more", hint)
    return parse_json_object(raw, str(path), hint)


def parse_json_object(raw: bytes, where: str, hint: str | None = None) -> dict[str, Any]:
    """Parse UTF-8 text as one JSON object.

    Stricter than `json.loads`: refuses another encoding, a repeated key, NaN and infinities, numbers of more than
    100 digits, lone surrogates in keys, and nesting deeper than the interpreter's stack.

    Args:
        raw: the text.
        where: the file (and part of it) for messages.
        hint: what to do when the text is wrong.

    Raises:
        MoiieError: for each of these, saying where.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise MoiieError(f"{where}: not valid JSON: nested too deeply", hint) from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and the refusals below
        raise MoiieError(f"{where}: not valid JSON: {_shorten(str(error))}", hint) from error
    if not isinstance(value, dict):
        raise MoiieError(f"{where}: expected a JSON object, found {_json_type(value)}", hint)
    return value


def quote(name: str) -> str:
    """A name from a file, quoted and shortened so that it is safe in a one-line message."""
    return repr(_shorten(name))


def show(value: object) -> str:
    """Any value from a file, quoted and shortened so that it is safe in a one-line message."""
    if isinstance(value, str):
        return quote(value)
    try:
        return _shorten(repr(value))
    except RecursionError:  # JSON may be nested deeper than repr() can follow
        return "a deeply nested value"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {quote(key)} appears twice")
        try:
            key.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"key {quote(key)} holds a lone surrogate") from None
        result[key] = value
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text) if len(text) <= _MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"number {_shorten(text)} is out of range")
    return value


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-10:]}"
