"""Targets: the built-in ones, and what a recipe may make of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from moiie_export.builders import BUILDERS
from moiie_export.recipe import load_recipe
from moiie_export.recipe_targets import TargetSection, manifest_targets, recipe_targets
from moiie_export.targets import BACKENDS, BUILT_IN, DIALECT_SMS, find_target
from moiie_runtime.errors import MoiieError


def test_built_in_targets_are_consistent() -> None:
    for name, target in BUILT_IN.items():
        assert target.name == name
        assert target.backend in BACKENDS
        assert set(target.sms) <= DIALECT_SMS.get(target.dialect, frozenset())
        assert bool(target.sms) == target.backend.startswith("tensorrt")
    assert set(BUILDERS) <= set(BACKENDS)
    gigabytes = {"orin-nano": 8, "orin-nx": 16, "orin-32": 32, "orin": 64, "thor": 128}
    assert {name: BUILT_IN[name].memory for name in gigabytes} == {name: n * 10**9 for name, n in gigabytes.items()}


def test_a_section_changes_what_it_names_and_nothing_else() -> None:
    own = recipe_targets([TargetSection("a", "orin", memory="32GB"), TargetSection("b", "a", plugins="off")])
    assert asdict(own["b"]) == {**asdict(BUILT_IN["orin"]), "name": "b", "memory": 32 * 10**9, "plugins": "off"}
    assert find_target("b", own) is own["b"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (TargetSection("../up", "cpu"), "letters, digits"),
        (TargetSection("rtx", "cpu"), "there is a target of this name already"),
        (TargetSection("x", "orion"), "did you mean orin"),
        (TargetSection("x", "orin", sms=(89, 87)), "ascending"),
        (TargetSection("x", "orin", sms=()), "at least one compute capability"),
        (TargetSection("x", "orin", prefill=()), "at least one is needed|at least one profile"),
        (TargetSection("x", "orin", memory="much"), "memory size"),
        (TargetSection("x", "orin", kv_cache="float16"), "kv_cache: means nothing for tensorrt"),
        (
            TargetSection("x", "ort-cuda", kv_cache="float32"),
            "kv_cache: ONNX Runtime on CUDA keeps .* precision, float16",
        ),
    ],
)
def test_sections_that_make_no_sense(section: TargetSection, says: str) -> None:
    with pytest.raises(MoiieError, match=says):
        recipe_targets([section])


def test_a_bundle_remembers_its_recipes_targets(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("schema: 1\nextends: default\ntargets:\n  - name: mine\n    like: rtx\n    sms: [89, 120]\n")
    recipe = load_recipe(path)
    assert manifest_targets({"recipe": recipe.resolved()}) == recipe_targets(recipe.targets)
    assert manifest_targets({}) == {}
    with pytest.raises(MoiieError, match=r"recipe.targets"):
        manifest_targets({"recipe": {"targets": [{"nome": "x"}]}})
