"""YAML text -> a tree that remembers the file and line of every value.

Only data gets through: plain maps, lists and scalars of one document. Anchors, aliases and tags are refused (so nothing
can expand or construct), keys may appear once, and scalars follow YAML 1.2's core schema: `1e-4` is a number, `yes` a
string, `1:30` no sexagesimal integer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from moiie_export.recipe_problems import Problem, RecipeError
from moiie_runtime.errors import MoiieError

MAX_BYTES = 64 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 16
_MAX_DIGITS = 300

Scalar: TypeAlias = "str | int | float | bool | None"

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Node:
    """A value, and where it stands (`line` counts from 1; for the value of a key it is the key's line)."""

    file: Path
    line: int
    value: Scalar | list[Node] | dict[str, Node]


def read_document(path: Path) -> tuple[Node, list[Problem]]:
    """The tree of one recipe file and its repeated keys.

    Raises:
        MoiieError: the file cannot be read.
        RecipeError: it is no YAML, or uses what a recipe may not (see the module's docstring), or is too large.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MoiieError(f"{path}: cannot read the recipe: {reason}") from error
    return parse_document(raw, path)


def parse_document(raw: bytes, path: Path) -> tuple[Node, list[Problem]]:
    """As `read_document`, for the bytes of `path`."""
    if len(raw) > MAX_BYTES:
        raise RecipeError([Problem(path, 1, "", f"larger than {MAX_BYTES // 1024} KiB, too large for a recipe")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError([Problem(path, line, "", "not UTF-8 text")]) from error
    builder = _Builder(path)
    try:
        root = builder.build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(
            [*builder.problems, Problem(path, mark.line + 1 if mark else 1, "", f"no YAML: {said}")]
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError([*builder.problems, Problem(path, 1, "", f"no YAML: {said}")]) from error
    return root, builder.problems


@dataclass
class _Frame:
    """A map or list under construction; `where` is its dotted key."""

    node: Node
    where: str
    key: str | None = None
    key_line: int = 0


@dataclass
class _Builder:
    """Turns the parser's events into nodes without recursion, so that depth is checked before it can hurt."""

    file: Path
    problems: list[Problem] = field(default_factory=list)
    _stack: list[_Frame] = field(default_factory=list)
    _root: Node | None = None
    _count: int = 0

    def build(self, events: Iterable[Any]) -> Node:
        documents = 0
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refuse(line, "a second document (---); a recipe is one document")
            elif isinstance(event, yaml.NodeEvent):
                self._refuse_references(event, line)
                self._open(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._stack.pop()
        return self._root if self._root is not None else Node(self.file, 1, None)

    def _open(self, event: Any, line: int) -> None:
        self._count += 1
        if self._count > MAX_NODES or len(self._stack) >= MAX_DEPTH:
            limit = f"{MAX_NODES} values" if self._count > MAX_NODES else f"{MAX_DEPTH} levels"
            raise self._refuse(line, f"more than {limit}, too much for a recipe")
        if isinstance(event, yaml.MappingStartEvent):
            node = Node(self.file, line, {})
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(self.file, line, [])
        else:
            node = Node(self.file, line, self._scalar(event, line))
        where = self._place(node, line)
        if isinstance(event, yaml.CollectionStartEvent):
            self._stack.append(_Frame(node, where))

    def _place(self, node: Node, line: int) -> str:
        """Adds `node` to the innermost map or list; returns its dotted key."""
        if not self._stack:
            self._root = node
            return ""
        frame = self._stack[-1]
        parent = frame.node.value
        if isinstance(parent, list):
            parent.append(node)
            return f"{frame.where}[{len(parent) - 1}]"
        if frame.key is None:
            if isinstance(node.value, (dict, list)):
                raise self._refuse(line, "a map or list as a key; keys are words")
            frame.key, frame.key_line = str(node.value), line
            return frame.where
        assert isinstance(parent, dict)
        name, frame.key = frame.key, None
        where = f"{frame.where}.{name}" if frame.where else name
        if name in parent:
            first = f"repeated key (first on line {parent[name].line})"
            self.problems.append(Problem(self.file, frame.key_line, where, first))
        else:
            parent[name] = Node(self.file, frame.key_line, node.value)
        return where

    def _refuse(self, line: int, what: str) -> RecipeError:
        return RecipeError([*self.problems, Problem(self.file, line, "", what)])

    def _refuse_references(self, event: Any, line: int) -> None:
        if event.anchor is not None:
            mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise self._refuse(
                line, f"`{mark}{event.anchor}`: anchors and aliases are not supported; write the value out"
            )
        if getattr(event, "tag", None) is not None:
            raise self._refuse(line, f"tag `{event.tag}`: tags are not supported; a recipe is plain data")

    def _scalar(self, event: Any, line: int) -> Scalar:
        text: str = event.value
        if event.style is not None:
            return text
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _FLOAT.fullmatch(text) and len(text) > _MAX_DIGITS:
            raise self._refuse(line, f"a number of {len(text)} characters")
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return text
