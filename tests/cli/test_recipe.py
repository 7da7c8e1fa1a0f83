"""`moiie recipe`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moiie_export.recipe import load_recipe, shipped_recipes
from tests.cli.conftest import Moiie


def test_ls(moiie: Moiie) -> None:
    result = moiie("recipe", "ls")
    assert (result.code, result.err) == (0, "")
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names == [path.stem for path in shipped_recipes()]
    assert {"default", "moiie-llama3", "moiie-phi3-s2", "moiie-phi3"} <= set(names)
    listed = moiie("recipe", "ls", "--json").document["recipes"]
    assert [each["name"] for each in listed] == names
    assert Path(listed[0]["path"]).is_file()


def test_show_prints_the_file_as_it_is(moiie: Moiie) -> None:
    result = moiie("recipe", "show", "moiie-phi3")
    assert result.code == 0
    assert result.out == load_recipe("moiie-phi3").path.read_text(encoding="utf-8")  # type: ignore[union-attr]


def test_what_show_resolved_prints_is_a_valid_recipe_with_the_same_content(moiie: Moiie, tmp_path: Path) -> None:
    shown = moiie("recipe", "show", "moiie-phi3", "--resolved").out
    copy = tmp_path / "copy.yaml"
    copy.write_text(shown, encoding="utf-8")
    assert load_recipe(copy).resolved() == load_recipe("moiie-phi3").resolved()
    assert moiie("recipe", "show", "moiie-phi3", "--json").document == yaml.safe_load(shown)


def test_schema_is_one_json_document(moiie: Moiie) -> None:
    assert moiie("recipe", "show", "--schema").document["title"] == "moiie recipe"


def test_cp_to_a_file_and_into_a_directory(moiie: Moiie, tmp_path: Path) -> None:
    assert moiie("recipe", "cp", "moiie-phi3", tmp_path / "my.yaml").out == f"{tmp_path / 'my.yaml'}\n"
    assert moiie("recipe", "cp", "moiie-phi3", tmp_path).out == f"{tmp_path / 'moiie-phi3.yaml'}\n"
    assert load_recipe(tmp_path / "my.yaml").export == load_recipe("moiie-phi3").export


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("exists.yaml", "exists.yaml: exists already"),
        ("no/such/x.yaml", "no/such/x.yaml: there is no directory"),
        ("x.txt", "x.txt: a recipe's file name ends in .yaml"),
    ],
)
def test_cp_refuses(moiie: Moiie, tmp_path: Path, target: str, error: str) -> None:
    (tmp_path / "exists.yaml").write_text("kept", encoding="utf-8")
    result = moiie("recipe", "cp", "default", tmp_path / target)
    assert (result.code, result.out) == (1, "")
    assert error in result.error
    assert (tmp_path / "exists.yaml").read_text(encoding="utf-8") == "kept"
    assert moiie("recipe", "cp", "default", tmp_path / "exists.yaml", "--force").code == 0


def test_validate(moiie: Moiie, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("schema: 1\n", encoding="utf-8")
    bad.write_text("schema: 1\nexprt: {}\ngeneration: {top_k: x}\n", encoding="utf-8")
    assert moiie("recipe", "validate", good).out == f"{good}: valid\n"
    result = moiie("recipe", "validate", good, bad)
    assert (result.code, result.out) == (3, "")
    assert result.error == (
        f"2 problems in the recipe\n  {bad}:2: exprt: unknown key (did you mean export?)\n"
        f"  {bad}:3: generation.top_k: expected a whole number, found 'x'"
    )
    result = moiie("recipe", "validate", bad, "--json")
    assert result.code == 3
    assert result.document["valid"] is False
    assert [each["key"] for each in result.document["problems"]] == ["exprt", "generation.top_k"]


def test_an_unknown_recipe_exits_1(moiie: Moiie) -> None:
    result = moiie("recipe", "show", "moiie-phi")
    assert (result.code, result.out) == (1, "")
    assert result.hint == "did you mean moiie-phi3?"
