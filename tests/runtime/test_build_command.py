"""The command that makes a built form again says what the target's name alone does not; engine.json may hold anything."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from moiie_runtime.build_command import build_command

ROOT = Path("b.bundle")
PLAIN = "moiie build b.bundle --target rtx"


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, ""),
        ({"options": {}, "plugins": None}, ""),
        ({"plugins": {"embedded": True}}, " --plugins LIBRARY"),
        ({"options": {"recipe": "r.yaml"}}, " --recipe r.yaml"),
        ({"options": {"sm": [86, 89]}}, " --sm 86,89"),
        (
            {"options": {"sm": [89], "recipe": "r.yaml"}, "plugins": {"file": "x"}},
            " --recipe r.yaml --sm 89 --plugins LIBRARY",
        ),
    ],
)
def test_it_says_what_is_needed(document: dict[str, Any], says: str) -> None:
    assert build_command(ROOT, "rtx", document) == PLAIN + says


def test_other_gpus_take_the_place_of_those_that_were_chosen() -> None:
    document = {"options": {"sm": [86]}, "plugins": {"file": None}}
    assert build_command(ROOT, "rtx", document, sm=[87, 89], plugins="l.so") == f"{PLAIN} --sm 87,89 --plugins l.so"


@pytest.mark.parametrize("junk", [None, 3, "x", [1], {"recipe": 3, "sm": 4}, {"recipe": "a\x1b[2Jb", "sm": "86"}])
def test_what_makes_no_sense_is_left_out(junk: object) -> None:
    assert build_command(ROOT, "rtx", {"options": junk}) == PLAIN


def test_a_shell_reads_back_each_word() -> None:
    document = {"options": {"recipe": "my recipe; rm -r x", "sm": ["$(x)"]}}
    words = shlex.split(build_command(Path("my bundle"), "rtx", document))
    assert words == ["moiie", "build", "my bundle", "--target", "rtx", "--recipe", "my recipe; rm -r x", "--sm", "$(x)"]
