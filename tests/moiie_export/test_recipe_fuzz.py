"""Whatever a recipe file holds, reading it ends quickly with a recipe or a MoiieError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_export.recipe import Recipe, parse_recipe
from moiie_export.recipe_schema import key_paths
from moiie_runtime.errors import MoiieError

WORDS = sorted({part for path in key_paths(Recipe) for part in path.split(".")})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["default", "moiie-phi3", "float32", "./x.yaml", "r.yaml", ""]),
    st.text(max_size=20),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
TREES = st.recursive(
    SCALARS,
    lambda children: st.one_of(st.lists(children, max_size=4), st.dictionaries(KEYS, children, max_size=5)),
    max_leaves=20,
)
YAML_LIKE = st.text(alphabet="ab:-[]{},&*!|>'\"%@#?~ \n\t1.\\x", max_size=200)


def judge(raw: bytes, tmp: Path = Path("/nowhere/r.yaml")) -> None:
    try:
        resolved = parse_recipe(raw, tmp).resolved()
    except MoiieError as error:
        resolved = {"error": error.message}
    assert json.dumps(resolved, allow_nan=False)


@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    judge(raw)


@given(YAML_LIKE)
@settings(max_examples=300)
def test_any_text_of_yamls_own_characters(text: str) -> None:
    judge(b"schema: 1\n" + text.encode())


@given(st.dictionaries(st.sampled_from(WORDS), TREES, max_size=6))
@settings(max_examples=300)
def test_any_tree_of_values_under_known_keys(tree: dict[str, Any]) -> None:
    judge(json.dumps({"schema": 1, **tree}, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@given(st.text(max_size=100), st.sampled_from(WORDS))
def test_any_scalar_in_any_place(text: str, word: str) -> None:
    judge(f"schema: 1\n{word}: {text}".encode("utf-8", "surrogatepass"))
