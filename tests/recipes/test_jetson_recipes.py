"""The recipes for Jetsons: each fits the target it brings, and says in its head what was predicted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moiie_export.check.report import CheckReport, check_model
from moiie_export.recipe import load_recipe
from moiie_export.recipe_targets import recipe_targets
from moiie_export.source import ModelSource
from moiie_export.targets import find_target
from tests.hollow import write_full_size

RECIPES = {
    "phi3-int4-orin": "phi3",
    "phi3-fp16-thor": "phi3",
    "llama3-int4-agx-orin": "llama3",
    "mome-int8-orin": "mome",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hollow checkpoint of full size for each model."""
    folder = tmp_path_factory.mktemp("full size")
    for name in sorted({*RECIPES.values()}):
        write_full_size(folder / name, name)
    return folder


def checked(name: str, checkpoint: Path, target: str | None = None, context: int | None = None) -> CheckReport:
    recipe = load_recipe(name)
    own = recipe_targets(recipe.targets)
    recipe = replace(recipe, export=replace(recipe.export, max_context=context or recipe.export.max_context))
    with ModelSource.open(checkpoint) as source:
        return check_model(source, recipe, find_target(target or next(iter(own)), own))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_target_as_it_says(name: str, checkpoints: Path) -> None:
    report = checked(name, checkpoints / RECIPES[name])
    assert report.supported
    assert report.target.memory is not None
    said = re.search(r"predicts ([\d.]+) GiB of ([\d.]+) GiB", _head(name))
    assert said is not None
    assert [f"{size / 2**30:.1f}" for size in (report.memory.peak, report.target.memory)] == [*said.groups()]
    after = re.search(r"([\d.]+) while it answers", _head(name))
    released = report.target.residency == "after_prefill"
    assert (after is not None) == released
    if after is not None:
        assert f"{report.memory.answering(True) / 2**30:.1f}" == after[1]
    if report.memory.vision_experts:  # a picture of 729 tokens and a question in one step
        assert any(rows > 729 + 100 for rows in report.target.prefill)


def test_an_orin_nano_has_no_room_as_the_recipe_says(checkpoints: Path) -> None:
    report = checked("phi3-int4-orin", checkpoints / "phi3", "orin-nano", 1024)
    assert not report.fits
    assert all(row.supported for row in report.rows)
    assert f"{report.memory.peak / 2**30:.1f} GiB even with --max-context 1024" in _head("phi3-int4-orin")


@pytest.mark.parametrize("name", RECIPES)
def test_its_head_names_the_targets_sm_and_what_was_not_tried(name: str) -> None:
    recipe = load_recipe(name)
    (target,) = recipe_targets(recipe.targets).values()
    (sm,) = target.sms
    assert f"moiie plugins build --sm {sm} " in _head(name)
    assert f"--target {target.name}" in _head(name)
    assert "Not run on a Jetson yet" in _head(name)


def _head(name: str) -> str:
    path = load_recipe(name).path
    assert path is not None
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return " ".join(lines)
