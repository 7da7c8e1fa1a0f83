"""Quantisation on the command line: mistakes in rules are found before anything is written; what bundles hold is shown."""

from __future__ import annotations

import json
from pathlib import Path

from moiie_runtime.tensors import read_header
from tests.cli.conftest import Moiie
from tests.exports import exported
from tests.moiie_export.parity.conftest import CONTEXT
from tests.moiie_export.parity.test_quantised import RULES, SETTINGS


def test_inspect_shows_formats_by_bank(moiie: Moiie) -> None:
    out = moiie("inspect", exported(SETTINGS, max_context=CONTEXT, rules=RULES).bundle).out
    assert "tensors quantised" in out
    banks = {tuple(line.split()[:2]) for line in out.split("by bank:")[1].splitlines() if line}
    assert {
        ("lm_head", "int8"),
        ("vision_experts", "float16"),
        ("shared_experts", "int4"),
        ("norms", "float32"),
    } <= banks


def test_a_rule_that_cannot_be_is_refused_before_anything_is_written(moiie: Moiie, tmp_path: Path) -> None:
    checkpoint = exported(SETTINGS, max_context=CONTEXT, rules=RULES).checkpoint
    recipe = tmp_path / "r.yaml"
    rules = [{"match": "dense", "format": "int4", "group_size": 128}, {"match": "atention.*", "format": "int8"}]
    recipe.write_text(json.dumps({"schema": 1, "quantization": {"rules": rules}}), encoding="utf-8")
    validated = moiie("recipe", "validate", recipe, "--checkpoint", checkpoint, "--json")
    assert validated.code == 3
    assert [each["key"] for each in validated.document["problems"]] == ["quantization.rules[0]"] * 2 + [
        "quantization.rules[1]"
    ]
    assert moiie("recipe", "validate", recipe).code == 0, "no checkpoint, nothing to hold against"
    for option in ([], ["--dry-run"]):
        result = moiie("export", recipe, "--checkpoint", checkpoint, "-o", tmp_path / "bundle", *option)
        assert result.code == 3
        assert "group_size 128 does not divide the rows of 64 of decoder.layers.0.mlp.gate_up_proj.weight" in result.err
        assert "groups that do: 32, 64" in result.err
        assert "match 'atention.*': no weight; nearest names" in result.err
        assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_dry_run_says_what_will_be_written(moiie: Moiie, tmp_path: Path) -> None:
    settled = exported(SETTINGS, max_context=CONTEXT, rules=RULES)
    recipe = tmp_path / "r.yaml"
    rules = [{**rule, "match": list(rule["match"])} for rule in RULES]
    recipe.write_text(json.dumps({"schema": 1, "quantization": {"rules": rules}}), encoding="utf-8")
    options = ["--checkpoint", settled.checkpoint, "-o", tmp_path / "bundle", "--dry-run", "--json"]
    planned = moiie("export", recipe, *options).document["bytes"]
    header = read_header(settled.bundle / "onnx" / "weights.safetensors")
    assert planned == sum(info.nbytes for info in header.values())
