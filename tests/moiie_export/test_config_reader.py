"""Typed reading of config.json: whatever a key holds, it is read or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiie_export.config import parse_config
from moiie_export.config_reader import ConfigReader
from moiie_export.model_config import ModelConfig
from moiie_runtime.errors import MoiieError

GOLDEN = Path(__file__).parents[1] / "golden"
PHI3 = json.loads((GOLDEN / "moiie_phi3" / "checkpoint" / "config.json").read_text())
LLAMA = json.loads((GOLDEN / "moiie_llama3" / "checkpoint" / "config.json").read_text())
TOWER = json.loads((GOLDEN / "moiie_phi3" / "vision_tower" / "siglip-tiny-patch14-384" / "config.json").read_text())


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "num_experts",
        "num_experts_per_tok",
        "mm_vision_tower",
    ],
)
@pytest.mark.parametrize("absent", [..., None])
def test_missing_keys_are_named(key: str, absent: Any) -> None:
    raw = {name: value for name, value in PHI3.items() if name != key} | ({key: None} if absent is None else {})
    with pytest.raises(MoiieError, match=f"config.json: {key}: missing") as caught:
        parse_config(raw, TOWER)
    assert key in str(caught.value.hint)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", "32", "an integer of at least 1"),
        ("hidden_size", 32.0, "an integer of at least 1"),
        ("hidden_size", True, "an integer of at least 1"),
        ("num_hidden_layers", 0, "an integer of at least 1"),
        ("num_hidden_layers", 10**9, "an integer of at most 10000"),
        ("num_experts", 0, "an integer of at least 1"),
        ("num_experts_per_tok", -2, "an integer of at least 1"),
        ("rms_norm_eps", 0, "a positive number"),
        ("rms_norm_eps", "1e-5", "a positive number"),
        ("rope_theta", float("inf"), "a positive number"),
        ("rope_theta", float("nan"), "a positive number"),
        ("rope_theta", 10**400, "a positive number"),
        ("sliding_window", -1, "an integer of at least 0"),
        ("use_s2", "false", "true or false"),
        ("unfreeze_vision_tower", 1, "true or false"),
        ("mm_vision_tower", {}, "a string"),
        ("eos_token_id", "3", "a token id or a list of them"),
        ("eos_token_id", [3, -1], "a token id or a list of them"),
        ("eos_token_id", True, "a token id or a list of them"),
        ("bos_token_id", -1, "an integer of at least 0"),
        ("tokenizer_model_max_length", 0, "an integer of at least 1"),
        ("mm_vision_select_layer", "-2", "an integer"),
    ],
)
def test_ill_typed_values_are_named_with_what_was_expected(key: str, value: Any, expected: str) -> None:
    with pytest.raises(MoiieError, match=f"config.json: {key}: expected {expected}, found "):
        parse_config({**PHI3, key: value}, TOWER)


def test_null_counts_as_absent() -> None:
    reader = ConfigReader({"empty": None, "zero": 0, "off": False}, "some.json")
    assert (reader.integer("empty", 7), reader.text("empty", "a"), reader.boolean("empty", True)) == (7, "a", True)
    assert (reader.optional_integer("empty"), reader.optional_integer("zero"), reader.int_list("empty")) == (
        None,
        0,
        (),
    )
    assert reader.boolean("off", True) is False
    reader.only("empty", 1)
    reader.one_of("empty", ("a",))
    with pytest.raises(MoiieError, match="some.json: zero: expected an integer of at least 1, found 0"):
        reader.integer("zero")


def test_sections_name_their_key_in_every_message() -> None:
    reader = ConfigReader({"a": {"b": {"c": "x"}}, "list": [{"n": 0}, {"n": "y"}], "empty": [], "no": 3}, "some.json")
    with pytest.raises(MoiieError, match="some.json: a: b: c: expected an integer of at least 1, found 'x'"):
        reader.section("a").section("b").integer("c")
    with pytest.raises(MoiieError, match=r"some.json: list\[1\]: n: expected an integer"):
        reader.sections("list")[1].integer("n")
    with pytest.raises(MoiieError, match="some.json: a: gone: missing"):
        reader.section("a").section("gone")
    with pytest.raises(MoiieError, match="some.json: no: expected an object, found 3"):
        reader.section("no")
    for key in ("no", "empty", "a"):
        with pytest.raises(MoiieError, match=f"some.json: {key}: expected a list of objects"):
            reader.sections(key)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 2000) | st.just(10**400) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted({*PHI3, *LLAMA, "moe_layers", "s2_scales", "expert_offset", "head_dim"})), value=JSON)
def test_any_value_of_any_key_is_read_or_refused(key: str, value: Any) -> None:
    try:
        assert isinstance(parse_config({**PHI3, "use_s2": True, "mm_hidden_size": 48, key: value}, TOWER), ModelConfig)
    except MoiieError as error:
        assert error.message.startswith(("config.json: ", "vision tower config.json: "))


@given(key=st.sampled_from(sorted({*TOWER, "vision_config"})), value=JSON, whole=st.booleans())
def test_any_value_of_any_key_of_the_tower_is_read_or_refused(key: str, value: Any, whole: bool) -> None:
    tower = {**TOWER, key: value}
    try:
        wrapped = {"model_type": "siglip", "vision_config": tower} if whole else tower
        assert isinstance(parse_config(PHI3, wrapped), ModelConfig)
    except MoiieError as error:
        assert error.message.startswith(("config.json: ", "vision tower config.json: "))
