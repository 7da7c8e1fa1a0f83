from __future__ import annotations

import pytest

from moiie_runtime.errors import MoiieError
from moiie_runtime.generation_config import GenerationConfig


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, "5", True]),
        ("do_sample", [1, "true"]),
        ("temperature", [-0.1, 1e-9, False, float("nan"), float("inf"), "0.5", True, 10**400]),
        ("top_k", [-1, 2.0, True]),
        ("top_p", [0, -1, 1e-9, 1.01, float("nan"), "0.9"]),
        ("repetition_penalty", [0, -1, 1e-9, float("inf"), "1"]),
        ("num_beams", [0, -1, 2.0, "2", True]),
        ("length_penalty", [-11, 11, float("nan"), "1", False]),
        ("eos_token_id", [-1, [3, -1], "3", [1.0], 2.5, {3}, [True]]),
        ("stop_strings", ["", ["a", ""], [3], 3, {"a"}]),
        ("seed", [-1, 1.0, "0", True]),
    ],
)
def test_every_bad_value_is_an_error_that_names_it(name, values):
    for value in values:
        with pytest.raises(MoiieError, match=f"generation setting {name} must be"):
            GenerationConfig(**{name: value})


def test_one_id_or_string_counts_as_a_list():
    config = GenerationConfig(eos_token_id=3, stop_strings="a")
    assert (config.eos_token_id, config.stop_strings) == ((3,), ("a",))
    assert GenerationConfig(eos_token_id=[3, 4]).eos_token_id == (3, 4)


def test_changes_keep_the_rest_and_none_changes_nothing():
    config = GenerationConfig(max_new_tokens=7, eos_token_id=(3,)).updated({"repetition_penalty": 1.2, "seed": None})
    assert config == GenerationConfig(max_new_tokens=7, eos_token_id=(3,), repetition_penalty=1.2)


def test_an_unknown_name_suggests_the_right_one():
    with pytest.raises(MoiieError, match="unknown generation setting 'max_tokens'") as caught:
        GenerationConfig().updated({"max_tokens": 3})
    assert "max_new_tokens" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": 1.0}, False),
        ({"temperature": 0}, True),
        ({"top_k": 5}, False),
        ({"top_k": 0}, True),
        ({"top_p": 0.9}, False),
        ({"do_sample": True}, False),
        ({"do_sample": True, "temperature": 0}, True),
        ({"do_sample": False, "temperature": 0, "top_p": 1}, True),
        ({"repetition_penalty": 1.5}, True),
    ],
)
def test_settings_of_draws_turn_drawing_on(changes, greedy):
    assert GenerationConfig().updated(changes).greedy is greedy


def test_a_bundle_that_draws_can_be_asked_not_to():
    config = GenerationConfig(do_sample=True, temperature=0.7)
    assert config.updated({"do_sample": False}).greedy
    assert config.updated({"temperature": 0}).greedy


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_contradictions_are_refused(name):
    with pytest.raises(MoiieError, match=f"{name}=0.5 has no effect with do_sample=False"):
        GenerationConfig().updated({"do_sample": False, name: 0.5})


def test_beams_and_draws_exclude_each_other():
    beams = GenerationConfig(num_beams=5)
    assert beams.greedy
    with pytest.raises(MoiieError, match="num_beams=5 and do_sample=True exclude each other") as caught:
        beams.updated({"temperature": 0.7})
    assert "num_beams=1" in caught.value.hint
    with pytest.raises(MoiieError, match="num_beams=2 and do_sample=True"):
        GenerationConfig(do_sample=True).updated({"num_beams": 2})
    assert not beams.updated({"temperature": 0.7, "num_beams": 1}).greedy
    assert beams.updated({"temperature": 0}).num_beams == 5
    assert GenerationConfig(do_sample=True).updated({"num_beams": 2, "do_sample": False}).greedy


def test_a_length_penalty_needs_beams():
    with pytest.raises(MoiieError, match="length_penalty=2 has no effect with num_beams=1"):
        GenerationConfig().updated({"length_penalty": 2})
    assert GenerationConfig().updated({"length_penalty": 1.0}) == GenerationConfig()
    assert GenerationConfig(num_beams=3, length_penalty=2).updated({"num_beams": 1}).length_penalty == 2
