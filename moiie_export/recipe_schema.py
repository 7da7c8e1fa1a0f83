"""Dataclasses as a schema: checks a tree against them, and prints them as JSON Schema.

A key is a dataclass field made with `key(...)`; its annotation says the type, its metadata the limits and the help text.
Understood annotations: bool, int, float, str, Path, Literal of strings or numbers, `X | None`, tuple[X, ...] and
dataclasses of these. A dataclass may have a method `contradictions` that yields (key, what is wrong, hint or None).
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from moiie_export.recipe_document import Node
from moiie_export.recipe_problems import Problem

T = TypeVar("T")

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}


@dataclass(frozen=True)
class Limits:
    """What a key's value may be, beyond its type. `single`: a list of one may be written as its only item."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    single: bool = False

    def broken_by(self, value: float) -> str | None:
        """What was expected of `value`, or None when it is within the limits."""
        if self.minimum is not None and value < self.minimum:
            return f"at least {self.minimum:g}"
        if self.above is not None and value <= self.above:
            return f"more than {self.above:g}"
        if self.maximum is not None and value > self.maximum:
            return f"at most {self.maximum:g}"
        return None


def key(about: str, default: Any = MISSING, *, factory: Any = MISSING, limits: Limits | None = None) -> Any:
    """A dataclass field that is a recipe key."""
    metadata = {"help": about, "limits": limits or Limits()}
    return field(default=default, default_factory=factory, metadata=metadata)


class Checker:
    """Builds dataclasses from nodes and collects what is wrong with them in `problems`."""

    def __init__(self, root: type) -> None:
        self._root = root
        self.problems: list[Problem] = []

    @cached_property
    def _paths(self) -> list[str]:
        return key_paths(self._root)

    def build(self, cls: type[T], node: Node, where: str = "") -> T | None:
        """An instance of the dataclass `cls`, or None when a problem was found in `node`."""
        if node.value is None:
            node = Node(node.file, node.line, {})
        if not isinstance(node.value, dict):
            self._expected("a map of keys", node, where)
            return None
        types_ = _hints(cast("Any", cls))
        known = {each.name: each for each in _keys(cls)}
        before = len(self.problems)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            dotted = f"{where}.{name}" if where else name
            if name not in known:
                self.problems.append(
                    Problem(child.file, child.line, dotted, "unknown key", self._suggest(name, list(known)))
                )
                continue
            values[name] = self._value(types_[name], child, dotted, known[name].metadata["limits"])
        for name, each in known.items():
            if name not in node.value and each.default is MISSING and each.default_factory is MISSING:
                self.problems.append(Problem(node.file, node.line, f"{where}.{name}" if where else name, "missing key"))
        return self._consistent(cls(**values), node, where) if len(self.problems) == before else None

    def _consistent(self, built: T, node: Node, where: str) -> T | None:
        """`built`, unless it says that its keys contradict each other."""
        before = len(self.problems)
        for name, text, hint in getattr(built, "contradictions", tuple)():
            child = _at(node, name)
            self.problems.append(Problem(child.file, child.line, f"{where}.{name}" if where else name, text, hint))
        return built if len(self.problems) == before else None

    def _suggest(self, name: str, known: list[str]) -> str:
        close = difflib.get_close_matches(name, known, n=1)
        if close:
            return f"did you mean {close[0]}?"
        elsewhere = [path for path in self._paths if path.split(".")[-1] == name]
        if elsewhere:
            return f"did you mean {elsewhere[0]}?"
        return f"known keys here: {', '.join(known)}"

    def _expected(self, what: str, node: Node, where: str, hint: str | None = None) -> None:
        self.problems.append(Problem(node.file, node.line, where, f"expected {what}, found {show(node.value)}", hint))

    def _value(self, kind: Any, node: Node, where: str, limits: Limits) -> Any:
        options = _optional(kind)
        if options is not None:
            return None if node.value is None else self._value(options, node, where, limits)
        if is_dataclass(kind):
            return self.build(cast("type[Any]", kind), node, where)
        origin = get_origin(kind)
        if origin is tuple:
            return self._list(get_args(kind)[0], node, where, limits)
        if origin is Literal:
            return self._choice(get_args(kind), node, where)
        if kind in (int, float):
            return self._number(kind, node, where, limits)
        return self._plain(kind, node, where)

    def _list(self, kind: Any, node: Node, where: str, limits: Limits) -> tuple[Any, ...]:
        if limits.single and not isinstance(node.value, list):
            return (self._value(kind, node, where, Limits()),)
        if not isinstance(node.value, list):
            self._expected("a list", node, where)
            return ()
        return tuple(self._value(kind, child, f"{where}[{index}]", Limits()) for index, child in enumerate(node.value))

    def _choice(self, choices: tuple[Any, ...], node: Node, where: str) -> Any:
        for choice in choices:
            if type(node.value) is type(choice) and node.value == choice:
                return choice
        words = [str(choice) for choice in choices]
        close = difflib.get_close_matches(str(node.value), words, n=1)
        self._expected(" or ".join(words), node, where, f"did you mean {close[0]}?" if close else None)
        return None

    def _number(self, kind: type, node: Node, where: str, limits: Limits) -> float | None:
        value = node.value
        if kind is int and type(value) is not int:
            self._expected("a whole number", node, where)
        elif type(value) not in (int, float) or not _finite(cast("float", value)):
            self._expected("a number", node, where)
        else:
            number = cast("float", value)
            broken = limits.broken_by(number)
            if broken is None:
                return number if kind is int else float(number)
            self._expected(broken, node, where)
        return None

    def _plain(self, kind: type, node: Node, where: str) -> Any:
        value = node.value
        if kind is bool:
            if isinstance(value, bool):
                return value
            self._expected("true or false", node, where)
        elif not isinstance(value, str):
            self._expected("a path" if kind is Path else "a text", node, where, _quote_hint(value))
        elif kind is Path:
            if value and "\0" not in value:
                return Path(os.path.abspath(node.file.parent / Path(value).expanduser()))  # noqa: PTH100 - keeps links
            self._expected("a path", node, where)
        else:
            return value
        return None


def _at(node: Node, dotted: str) -> Node:
    """The node of a key such as `targets[1].sms`, or the innermost one above it that is written."""
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", dotted):
        if name and isinstance(node.value, dict) and name in node.value:
            node = node.value[name]
        elif index and isinstance(node.value, list) and int(index) < len(node.value):
            node = node.value[int(index)]
        else:
            break
    return node


def key_paths(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of `cls`, sections first."""
    found = []
    for name, kind in ((each.name, _hints(cls)[each.name]) for each in _keys(cls)):
        found.append(prefix + name)
        if is_dataclass(kind):
            found += key_paths(cast("type[Any]", kind), f"{prefix}{name}.")
    return found


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the dataclass `cls`, for editors."""
    properties: dict[str, Any] = {}
    hints = _hints(cls)
    for each in _keys(cls):
        entry = _type_schema(hints[each.name], each.metadata["limits"])
        entry["description"] = each.metadata["help"]
        if each.default is not MISSING:
            entry["default"] = each.default
        properties[each.name] = entry
    required = [each.name for each in _keys(cls) if each.default is MISSING and each.default_factory is MISSING]
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, "required": required} if required else schema


def _type_schema(kind: Any, limits: Limits) -> dict[str, Any]:
    options = _optional(kind)
    if options is not None:
        schema = _type_schema(options, limits)
        return {**schema, "type": [schema["type"], "null"]}
    if is_dataclass(kind):
        return json_schema(cast("type[Any]", kind))
    if get_origin(kind) is tuple:
        items = _type_schema(get_args(kind)[0], Limits())
        listed = {"type": "array", "items": items}
        return {"anyOf": [items, listed]} if limits.single else listed
    if get_origin(kind) is Literal:
        choices = list(get_args(kind))
        return {"type": _JSON_TYPES[type(choices[0])], "enum": choices}
    schema = {"type": _JSON_TYPES[kind]}
    bounds = {"minimum": limits.minimum, "maximum": limits.maximum, "exclusiveMinimum": limits.above}
    return schema | {name: bound for name, bound in bounds.items() if bound is not None}


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Annotations as types; reading them is dear, and every unknown key asks for all."""
    return get_type_hints(cls)


def _keys(cls: type) -> list[Any]:
    return [each for each in fields(cls) if "help" in each.metadata]


def _optional(kind: Any) -> Any:
    """X of `X | None`, or None for any other annotation."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(each for each in get_args(kind) if each is not type(None))
    return None


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def show(value: Any) -> str:
    """A value of a recipe as it would be written there, shortened."""
    if isinstance(value, (dict, list)):
        return "a map" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _quote_hint(value: Any) -> str | None:
    return f'put it in quotes: "{value}"' if isinstance(value, (int, float)) and not isinstance(value, bool) else None
