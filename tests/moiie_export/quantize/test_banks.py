"""Every parameter of every model is in one bank, and experts are in the one that their modalities say."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from moiie_export.config_reader import ConfigReader
from moiie_export.families import family_of
from moiie_export.families.family import DECODE
from moiie_export.mome_parser import parse_mome
from moiie_export.mome_published import PUBLISHED
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_export.quantize.banks import BANKS, EXPERTS, NEVER, PLAIN_ONLY, bank_of, expert_bank
from moiie_export.source import ModelSource
from tests.conftest import GoldenCase

IN_EVERY_MODEL = {"attention", "lm_head", "embed_tokens", "vision_tower", "projector", "norms", "biases"}


@pytest.mark.parametrize(
    ("case", "own"),
    [
        ("moiie_phi3", {"vision_experts", "shared_experts", "language_experts", "dense", "gates"}),
        ("moiie_llama3", {"vision_experts", "shared_experts", "language_experts", "dense", "gates"}),
        ("modality_moe_phi3", {"vision_experts", "language_experts", "dense", "gates"}),
        ("modality_hard_phi3", {"vision_experts", "language_experts", "dense"}),
        ("vanilla_moe_phi3", {"shared_experts", "dense", "gates"}),
        ("dense_phi3", {"dense"}),
    ],
)
def test_the_banks_of_a_model(case: str, own: set[str]) -> None:
    with ModelSource.open(GoldenCase(case).checkpoint) as source:
        moe = source.config.moe
        groups = None if moe is None else {str(name): ids for name, ids in moe.expert_groups.items()}
        found = {name: bank_of(name, groups) for name in source.weight_map.by_parameter()}
        users = {name: family_of(source.config).expected_users(name, source.config) for name in found}
    assert set(found.values()) == IN_EVERY_MODEL | own
    for name, bank in found.items():
        assert (bank == "vision_experts") == ("experts" in name and DECODE not in users[name]), name
        assert (bank in EXPERTS) == (".experts." in name), name
        assert (bank == "gates") == (".gate" in name and "gate_up" not in name), name


def test_the_banks_of_mome() -> None:
    config = parse_mome(ConfigReader(dict(PUBLISHED), "config.json"))
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for weight in build_mome_weight_map(config, config.text.vocab_size, {}).weights:
        found[bank_of(weight.name, None)][weight.name.rpartition(".")[2]] += 1
    own = {"dense", "adapters", "adt", "router"}
    assert set(found) == IN_EVERY_MODEL | own
    assert set(found["norms"]) == {"weight"}
    assert set(found["biases"]) == {"bias"}
    assert found["router"]["bias"] > 0, "everything of the router counts as such"
    assert found["attention"]["weight"] == found["dense"]["weight"] == 2 * config.text.num_hidden_layers


def test_an_experts_bank_follows_from_who_reaches_it() -> None:
    groups = {"vision": (0, 1, 2), "language": (1, 2, 3)}
    assert [expert_bank(expert, groups) for expert in range(4)] == [EXPERTS[0], EXPERTS[1], EXPERTS[1], EXPERTS[2]]
    with pytest.raises(ValueError, match="no modality reaches it"):
        expert_bank(4, groups)


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.other.weight", "decoder.layers.0.mlp.experts.0.down_proj", "x.y"]
)
def test_a_name_of_no_model(name: str) -> None:
    with pytest.raises(ValueError, match="in no bank"):
        bank_of(name, None)


def test_what_is_never_quantised_is_a_bank() -> None:
    assert {*NEVER, *PLAIN_ONLY, *EXPERTS} <= set(BANKS)
