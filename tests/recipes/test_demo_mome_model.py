"""The shipped MoME demo: small, in the layout that `moiie export` takes, and it sees, routes and needs its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moiie_export.checkpoint import Checkpoint
from moiie_export.cli.demo import command
from moiie_export.demo.charts import write_shares
from moiie_export.demo.evaluate import ablations, generations, prompts_of, pytorch_answers, score
from moiie_export.demo.mome import MOME
from moiie_export.demo.shares import shares_by_kind
from moiie_export.demo.shipped import export_demo, shipped_checkpoint
from moiie_export.demo.show import show
from moiie_export.model.load import load_model
from moiie_export.mome_config import MomeConfig
from moiie_export.source import ModelSource
from moiie_runtime.generate import Generation
from moiie_runtime.vlm import VLM, load

CHECKPOINT = shipped_checkpoint(MOME)
ITEMS = MOME.held_out(40, 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def vlm(directory: Path) -> VLM:
    return load(export_demo(MOME, directory))


@pytest.fixture(scope="module")
def answered(vlm: VLM) -> list[Generation]:
    return generations(MOME, vlm, ITEMS)


@pytest.fixture(scope="module")
def model() -> Any:
    with ModelSource.open(CHECKPOINT) as source:
        return load_model(source, "float16")


def test_the_model_is_small_and_has_three_encoders_and_four_adapters() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 2_800_000
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) <= 5_000_000
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        assert checkpoint.config["model_type"] == "mome"
        assert {entry.dtype for entry in checkpoint.tensors.values()} == {"F16"}
    with ModelSource.open(CHECKPOINT) as source:
        config = source.config
        assert isinstance(config, MomeConfig)
        assert [expert.name for expert in config.experts] == ["clip", "dino", "pix2struct"]
        assert (config.mole.num_experts, config.image_tokens) == (4, 37)


def test_the_bundle_answers_held_out_questions(answered: list[Generation]) -> None:
    found = score(MOME, ITEMS, [each.text for each in answered])
    assert found.overall >= 0.85
    assert found.by_kind["letter"] >= 0.75


def test_pytorch_gives_the_same_answers(vlm: VLM, model: Any, answered: list[Generation]) -> None:
    found = pytorch_answers(MOME, model, vlm, prompts_of(MOME, vlm, ITEMS))
    assert found == [each.text for each in answered]


def test_parts_taken_away_are_missed_and_come_back(vlm: VLM, model: Any) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = {each.name: each.accuracy for each in ablations(MOME, model, vlm, ITEMS, prompts_of(MOME, vlm, ITEMS))}
    assert found["grey picture"].overall <= 0.45
    assert found["picture of another question"].overall <= 0.45
    assert found["without clip"].by_kind["colour"] <= 0.5
    assert found["without dino"].by_kind["shape"] <= 0.6
    assert found["without pix2struct"].by_kind["letter"] <= 0.4
    assert all((parameter == before[name]).all() for name, parameter in model.named_parameters())


def test_what_experts_contribute_depends_on_what_is_asked(vlm: VLM, answered: list[Generation], tmp_path: Path) -> None:
    shares = shares_by_kind(MOME, vlm.bundle.encoders, ITEMS, answered)
    assert list(shares) == list(MOME.kinds)
    for each in shares.values():
        assert sum(each.contributions.values()) == pytest.approx(1, abs=1e-5)
        assert sum(each.weights.values()) == pytest.approx(1, abs=1e-5)
        assert len(each.adapters) == 4
    letters = shares["letter"].contributions
    assert max(letters, key=letters.__getitem__) == "pix2struct"
    assert all(letters["pix2struct"] > shares[kind].contributions["pix2struct"] + 0.1 for kind in MOME.kinds[:-1])
    pytest.importorskip("matplotlib")
    assert write_shares(tmp_path, shares).read_bytes().startswith(b"\x89PNG")


def test_the_demo_draws_asks_and_shows_the_routing(vlm: VLM, tmp_path: Path) -> None:
    shown = show(MOME, vlm, tmp_path, seed=0)
    assert shown.picture.is_file()
    assert [each.kind for each in shown.answers] == ["colour", "shape", "letter"]
    assert shown.routing is None
    for each in shown.answers:
        assert each.instance is not None
        assert set(each.instance) == {"move_weights", "contributions", "mole_index"}
        assert list(each.instance["mole_index"]) == ["0", "1", "2", "3"]


def test_the_command_measures_and_says_what_each_kind_was_routed_to(vlm: VLM, directory: Path) -> None:
    arguments = ["--family", "mome", "-o", str(directory), "--eval", "10", "--json"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["pytorch_accuracy"] == document["bundle_accuracy"]
    assert list(document["contributions"]) == list(MOME.kinds)
    assert set(document["move_weights"]["letter"]) == {"clip", "dino", "pix2struct"}
    assert "ablations" not in document
