"""The recipe's quantisation rules: what is read, and what is refused without a checkpoint, with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from moiie_export.quantize.scheme import FORMATS, GROUP_SIZES
from moiie_export.recipe import load_recipe, recipe_schema
from moiie_export.recipe_problems import RecipeError
from moiie_export.recipe_quantization import PLAIN, QuantRule


def write(folder: Path, rules: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(f"schema: 1\nquantization:\n  rules:\n{rules}", encoding="utf-8")
    return path


def test_rules_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path, "    - {match: lm_head, format: int8}\n    - {match: [dense, a.*], format: int4, group_size: 64}\n"
    )
    rules = load_recipe(path).quantization.rules
    assert rules == (QuantRule(("lm_head",), "int8"), QuantRule(("dense", "a.*"), "int4", 64))
    assert load_recipe(path).resolved()["quantization"]["rules"][1] == {
        "match": ["dense", "a.*"],
        "format": "int4",
        "group_size": 64,
        "method": None,
    }


@pytest.mark.parametrize(
    ("rule", "problem", "hint"),
    [
        ("{match: lm_haed, format: int8}", "match: unknown bank 'lm_haed'", "did you mean lm_head?"),
        (
            "{match: [dense, xyz], format: int8}",
            "match[1]: unknown bank 'xyz'",
            "banks: vision_experts, shared_experts",
        ),
        ("{match: [], format: int8}", "match: an empty list matches nothing", "banks: vision_experts"),
        ("{match: [gates, norms], format: int4}", "match: gates, norms: never quantised", "leave the rule out"),
        ("{match: embed_tokens, format: int4}", "match: embed_tokens: never quantised", "leave the rule out"),
        ("{match: dense, format: float16, group_size: 32}", "group_size: contradicts format float16", "leave it out"),
        ("{match: dense, format: fp8, group_size: 32}", "group_size: contradicts format fp8", "leave it out"),
        ("{match: dense, format: float32, method: rtn}", "method: contradicts format float32", "leave it out"),
        (
            "{match: dense, format: fp8, method: gptq}",
            "method: contradicts format fp8, which has no method 'gptq'",
            "rtn",
        ),
        (
            "{match: [dense, experts], format: w8a8}",
            "format: experts: experts have no w8a8 form",
            "int4, int8, fp8 or float16",
        ),
        ("{match: vision_experts, format: w8a8}", "format: vision_experts: experts have no w8a8 form", "before"),
        ("{match: dense, format: int4, method: qptq}", "which has no method 'qptq'", "methods of int4: rtn, awq, gptq"),
        ("{match: dense, format: itn4}", "format: expected int4 or int8 or fp8", "did you mean int4?"),
        ("{match: dense, format: int4, group_size: 16}", "group_size: expected 32 or 64 or 128, found 16", ""),
        ("{format: int4}", "match: missing key", ""),
        ("{match: 3, format: int4}", "match: expected a text, found 3", "in quotes"),
    ],
)
def test_a_rule_that_contradicts_itself(tmp_path: Path, rule: str, problem: str, hint: str) -> None:
    path = write(tmp_path, f"    - {{match: dense, format: int8}}\n    - {rule}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    first = caught.value.problems[0]
    assert str(first).startswith(f"{path}:5: quantization.rules[1]")
    assert problem in str(first)
    assert hint in (first.hint or "")


def test_the_keys_offer_what_the_schemes_have() -> None:
    hints = get_type_hints(QuantRule)
    assert get_args(get_args(hints["group_size"])[0]) == GROUP_SIZES
    assert set(get_args(hints["format"])) == {*FORMATS, *PLAIN}


def test_the_schema_takes_one_pattern_or_a_list() -> None:
    rule = recipe_schema()["properties"]["quantization"]["properties"]["rules"]["items"]
    text = {"type": "string"}
    assert rule["properties"]["match"]["anyOf"] == [text, {"type": "array", "items": text}]
    assert rule["required"] == ["match", "format"]


def test_the_default_recipe_names_every_bank_a_rule_can_take() -> None:
    from moiie_export.quantize.banks import BANKS, NEVER
    from moiie_export.recipe import find_recipe

    text = find_recipe("default").read_text(encoding="utf-8")
    assert [bank for bank in BANKS if bank not in NEVER and bank not in text] == []
