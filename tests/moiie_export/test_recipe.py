"""Recipes: what is shipped, what merges, and that every mistake is reported with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moiie_export.recipe import Recipe, list_recipes, load_recipe, recipe_schema, shipped_recipes
from moiie_export.recipe_problems import RecipeError
from moiie_runtime.errors import MoiieError

NO_TAGS = "tags are not supported; a recipe is plain data"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [str(problem).removeprefix(f"{path.parent}/") for problem in caught.value.problems]


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipe_is_valid_and_explained(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.description
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "#   moiie export" in text
    lines = text.splitlines()
    keys, explained = set(), {"schema", "description", "extends"}
    for before, line in zip(["", *lines], lines, strict=False):
        key, colon, value = line.strip().partition(":")
        if colon and value and not key.startswith("#"):
            keys.add(key)
            if "#" in value or before.strip().startswith("#"):
                explained.add(key)
    assert keys <= explained


def test_shipped_names() -> None:
    assert {recipe.name for recipe in list_recipes()} >= {"default", "moiie-llama3", "moiie-phi3-s2", "moiie-phi3"}


def test_default_recipe_is_the_defaults_of_the_dataclasses() -> None:
    default = load_recipe("default")
    assert replace(default, name="", description="", path=None) == Recipe(schema=1)


def test_child_merges_over_parent(tmp_path: Path) -> None:
    write(
        tmp_path / "parent.yaml",
        "schema: 1\nextends: default\nexport: {dtype: float16, max_context: 64}\n"
        "parity: {cases: [{prompt: a}, {prompt: b}]}\n",
    )
    child = write(
        tmp_path / "child.yaml",
        "schema: 1\nextends: ./parent.yaml\nexport: {max_context: 32}\ngeneration:\nparity: {cases: [{prompt: c}]}\n",
    )
    recipe = load_recipe(child)
    assert (recipe.export.dtype, recipe.export.max_context) == ("float16", 32)
    assert [case.prompt for case in recipe.parity.cases] == ["c"]
    assert recipe.generation == Recipe(schema=1).generation
    assert recipe.name == "child"


def test_names_and_descriptions_are_not_inherited(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "mine.yaml", "schema: 1\nextends: moiie-phi3\n"))
    assert (recipe.name, recipe.description) == ("mine", "")


def test_null_takes_back_a_parents_value(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "mine.yaml", "schema: 1\nextends: moiie-phi3\nexport: {max_context: null}\n"))
    assert recipe.export.max_context is None
    assert recipe.export.dtype == "float16"


def test_relative_paths_start_at_the_file_that_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "parent.yaml", "schema: 1\nmodel: {vision_tower: tower}\n")
    child = write(
        tmp_path / "a" / "b" / "child.yaml",
        "schema: 1\nextends: ../parent.yaml\nmodel: {checkpoint: ../x}\nparity: {cases: [{prompt: p, images: [i.png]}]}\n",
    )
    recipe = load_recipe(child)
    assert recipe.model.vision_tower == tmp_path / "a" / "tower"
    assert recipe.model.checkpoint == tmp_path / "a" / "x"
    assert recipe.parity.cases[0].images == (tmp_path / "a" / "b" / "i.png",)


def test_resolved_is_complete_json_and_names_no_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "schema: 1\nmodel: {checkpoint: sub/ckpt}\n")
    resolved = load_recipe(path).resolved()
    assert str(tmp_path) not in json.dumps(resolved)
    assert resolved["model"]["checkpoint"] == "ckpt"
    assert resolved["parity"]["bounds"]["float16"]["tie_margin"] == 1e-5
    assert load_recipe(path).resolved(absolute_paths=True)["model"]["checkpoint"] == str(tmp_path / "sub" / "ckpt")


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    bounds = "parity: {bounds: {float32: {logits_error: 1e-3, kv_error: 1, tie_margin: .5}}}"
    recipe = load_recipe(write(tmp_path / "r.yaml", f"schema: 1\n{bounds}\n"))
    found = recipe.parity.bounds.float32
    assert (found.logits_error, found.kv_error, found.tie_margin) == (1e-3, 1.0, 0.5)
    assert isinstance(found.kv_error, float)


def test_all_problems_are_reported_at_once_in_order_with_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "five.yaml",
        "schema: 1\n"
        "export:\n"
        "  dtype: float23\n"
        "  max_contxt: 4096\n"
        "generation:\n"
        "  top_p: 1.5\n"
        "  do_sample: true\n"
        "  do_sample: yes\n"
        "max_context: 3\n",
    )
    assert problems_of(path) == [
        "five.yaml:3: export.dtype: expected float32 or float16, found 'float23'",
        "five.yaml:4: export.max_contxt: unknown key",
        "five.yaml:6: generation.top_p: expected at most 1, found 1.5",
        "five.yaml:8: generation.do_sample: repeated key (first on line 7)",
        "five.yaml:9: max_context: unknown key",
    ]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "5 problems" in caught.value.message
    assert "did you mean max_context?" in caught.value.message
    assert "did you mean export.max_context?" in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("generation: {max_new_tokens: true}", "generation.max_new_tokens: expected a whole number, found true"),
        ("generation: {max_new_tokens: 1.0}", "generation.max_new_tokens: expected a whole number, found 1.0"),
        ("generation: {max_new_tokens: 0}", "generation.max_new_tokens: expected at least 1, found 0"),
        ("generation: {temperature: 0}", "generation.temperature: expected more than 0, found 0"),
        ("generation: {temperature: .inf}", "generation.temperature: expected a number, found '.inf'"),
        ("generation: {temperature: 1e999}", "generation.temperature: expected a number, found inf"),
        ("generation: {do_sample: 1}", "generation.do_sample: expected true or false, found 1"),
        ("generation: {do_sample: 'true'}", "generation.do_sample: expected true or false, found 'true'"),
        ("generation: [1]", "generation: expected a map of keys, found a list"),
        ("model: {checkpoint: 3}", "model.checkpoint: expected a path, found 3"),
        ("model: {checkpoint: ''}", "model.checkpoint: expected a path, found ''"),
        ("parity: {cases: [{images: [a.png]}]}", "parity.cases[0].prompt: missing key"),
        ("parity: {cases: [{prompt: 1}]}", "parity.cases[0].prompt: expected a text, found 1"),
        ("name: {a: b}", "name: expected a text, found a map"),
        ("extends: [default]", "extends: expected a text, found a list"),
        ("a b: 1", "a b: unknown key"),
        ("model: &x {}", "`&x`: anchors and aliases are not supported; write the value out"),
        ("model: *x", "`*x`: anchors and aliases are not supported; write the value out"),
        ("model: !!map {}", "tag `tag:yaml.org,2002:map`: " + NO_TAGS),
        ("model: !!python/name:os.system", "tag `tag:yaml.org,2002:python/name:os.system`: " + NO_TAGS),
        ("? [a]\n: 1", "a map or list as a key; keys are words"),
        ("---\nschema: 1", "a second document (---); a recipe is one document"),
    ],
)  # fmt: skip
def test_one_problem(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "r.yaml", f"schema: 1\n{line}\n")
    assert problems_of(path) == [f"r.yaml:2: {problem}"]


def test_a_list_item_is_named_by_its_index_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.yaml", "schema: 1\nparity:\n  cases:\n    - prompt: a\n    - prompt: b\n      picture: c\n"
    )
    assert problems_of(path) == ["r.yaml:6: parity.cases[1].picture: unknown key"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "r.yaml:1: schema: missing key"),
        ("export: {}\n", "r.yaml:1: schema: missing key"),
        ("- 1\n", "r.yaml:1: expected a map of keys, found a list"),
        ("schema: 2\nnew_key: 1\n", "r.yaml:1: schema: expected 1, found 2"),
        ("schema: '1'\n", "r.yaml:1: schema: expected 1, found '1'"),
        ("schema: true\n", "r.yaml:1: schema: expected 1, found true"),
        ("schema: 1\nname: 'x\n", "r.yaml:3: no YAML: while scanning a quoted scalar, found unexpected end of stream"),
        ("schema: 1\nname: x: y\n", "r.yaml:2: no YAML: mapping values are not allowed here"),
    ],
)  # fmt: skip
def test_problem_of_the_whole_file(tmp_path: Path, text: str, problem: str) -> None:
    assert problems_of(write(tmp_path / "r.yaml", text)) == [problem]


def test_a_newer_schema_says_to_update(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path / "r.yaml", "schema: 7\n"))
    assert caught.value.hint == "update moiie-export to a version that knows it"


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"schema: 1\nname: \xff\n", "r.yaml:2: not UTF-8 text"),
        (b"#" * 70_000, "r.yaml:1: larger than 64 KiB, too large for a recipe"),
        (b"schema: 1\nname: " + b"[" * 5000, "r.yaml:2: more than 16 levels, too much for a recipe"),
        (b"schema: 1\nname: [" + b"1," * 11_000 + b"]", "r.yaml:2: more than 10000 values, too much for a recipe"),
        (b"schema: 1\nexport: {max_context: " + b"9" * 5000 + b"}", "r.yaml:2: a number of 5000 characters"),
    ],
)
def test_limits(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    assert problems_of(path) == [problem]


def test_a_flood_of_problems_is_cut_in_the_message_only(tmp_path: Path) -> None:
    keys = "".join(f"key_{number}: 1\n" for number in range(1000))
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path / "r.yaml", f"schema: 1\n{keys}"))
    assert len(caught.value.problems) == 1000
    assert caught.value.message.startswith("1000 problems in the recipe\n")
    assert caught.value.message.endswith("\n  and 960 more")


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfschema: 1\r\nexport: {dtype: float16}\r\n")
    assert load_recipe(path).export.dtype == "float16"


def test_cycle_of_parents(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "schema: 1\nextends: b.yaml\n")
    write(tmp_path / "b.yaml", "schema: 1\nextends: ./a.yaml\n")
    assert problems_of(tmp_path / "a.yaml") == [
        "b.yaml:2: extends: a recipe cannot extend itself: a.yaml -> b.yaml -> a.yaml"
    ]


def test_missing_parent_does_not_hide_other_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "schema: 1\nextends: moiie-phi\nexprt: {}\n")
    first, second = problems_of(path)
    assert first.startswith("a.yaml:2: extends: no shipped recipe is called 'moiie-phi'")
    assert second == "a.yaml:3: exprt: unknown key"


def test_a_parents_problem_names_the_parents_file(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", "schema: 1\n\nexport: {dtype: int4}\n")
    path = write(tmp_path / "a.yaml", "schema: 1\nextends: parent.yaml\n")
    assert problems_of(path) == ["parent.yaml:3: export.dtype: expected float32 or float16, found 'int4'"]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("moiie-ph3", "no shipped recipe is called 'moiie-ph3'", "did you mean moiie-phi3?"),
        ("nowhere/x.yaml", "nowhere/x.yaml: no such recipe file", "`moiie recipe ls` lists the shipped recipes"),
        ("x.yaml", "x.yaml: no such recipe file", "`moiie recipe ls` lists the shipped recipes"),
    ],
)
def test_unknown_recipe(name: str, message: str, hint: str) -> None:
    with pytest.raises(MoiieError) as caught:
        load_recipe(name)
    assert message in caught.value.message
    assert caught.value.hint == hint


def test_schema_describes_every_key_and_its_default() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["schema"]
    export = schema["properties"]["export"]["properties"]
    assert export["dtype"] == {
        "type": "string",
        "enum": ["float32", "float16"],
        "default": "float32",
        "description": "How weights are stored. A CPU computes in float32 either way.",
    }
    assert export["max_context"]["type"] == ["integer", "null"]
    cases = schema["properties"]["parity"]["properties"]["cases"]
    assert cases["items"]["required"] == ["prompt"]

    def described(entry: dict[str, object]) -> None:
        properties = entry.get("properties", {})
        assert isinstance(properties, dict)
        for child in properties.values():
            assert child["description"]
            described(child)

    described(schema)


def test_recipes_need_no_torch() -> None:
    blocked = "import sys\nfor m in ('torch', 'onnx', 'transformers', 'onnxruntime', 'numpy'): sys.modules[m] = None\n"
    code = blocked + "from moiie_export.recipe import list_recipes; print(len(list_recipes()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(shipped_recipes()))
