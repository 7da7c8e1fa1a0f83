from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiie_runtime.manifest import Tokens
from moiie_runtime.prompt import Prompt, penalty_ids, token_modality, token_types

TYPES = st.lists(st.sampled_from([0, 1, 32000]), max_size=40)


def modality(types, rule=True):
    return token_modality(np.array(types, np.int32), last_image_token_is_language=rule).tolist()


@pytest.mark.parametrize(
    ("types", "vision"),
    [
        ([0, 1, 1, 1, 0], [0, 1, 1, 0, 0]),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 0]),
        ([1], [0]),
        ([0, 1, 0, 1, 1], [0, 0, 0, 1, 0]),
        ([32000, 1, 1, 1, 32000], [0, 1, 1, 0, 0]),
        ([], []),
    ],
)
def test_facts_of_the_specification(types, vision):
    assert modality(types) == vision


@given(types=TYPES)
def test_every_run_of_image_tokens_loses_its_last(types):
    found = modality(types)
    runs = "".join("v" if value == 1 else " " for value in types).split()
    assert sum(found) == sum(len(run) - 1 for run in runs)
    for index, value in enumerate(found):
        assert value == (types[index] == 1 and types[index + 1 : index + 2] == [1])


@given(types=TYPES)
def test_without_the_rule_every_image_token_is_vision(types):
    assert modality(types, rule=False) == [int(value == 1) for value in types]


def test_golden_types_and_masks(golden):
    ids = golden.about["special_ids"]
    tokens = Tokens(ids["bos"], (ids["eos"],), ids["pad"], "<image>", ids["image_placeholder"], 729)
    types = token_types(golden.expected["input_ids"].astype(np.int64), tokens)
    assert types.dtype == np.int32
    np.testing.assert_array_equal(types, golden.expected["token_type_ids"])
    np.testing.assert_array_equal(
        token_modality(types, last_image_token_is_language=True), golden.expected["vision_mask"]
    )
    assert len(types) == golden.about["sequence_length"]


def test_adjacent_pictures_are_one_run():
    tokens = Tokens(1, (3,), 3, "<image>", -200, 5)
    types = token_types(np.array([7, -200, -200, 8]), tokens)
    assert types.tolist() == [0, *[1] * 10, 0]
    assert sum(modality(types)) == 9


@pytest.mark.parametrize(("rule", "ids"), [("prompt", [1, 7, 9, 7]), ("bos", [1]), ("none", [])])
def test_what_the_penalty_counts_as_used(rule, ids):
    prompt = Prompt("", np.array([1, 7, -200, 9, 7]), np.zeros(7, np.int32), None, 3, 7)
    tokens = Tokens(1, (3,), None, "<image>", -200, 3)
    found = penalty_ids(prompt, rule, tokens)
    assert (found.tolist(), found.dtype) == (ids, np.int64)
