"""Against a second, slower computation of each rule, written from transformers' definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moiie_runtime import sampling
from moiie_runtime.errors import MoiieError
from moiie_runtime.generation_config import GenerationConfig
from moiie_runtime.sampling import Sampler

EMPTY = np.zeros(0, np.int64)
LOGITS = arrays(np.float32, st.integers(1, 12), elements=st.floats(-8, 8, width=16))


def probabilities(values):
    weights = [np.exp(float(value) - float(max(values))) for value in values]
    return [weight / sum(weights) for weight in weights]


@given(logits=LOGITS, data=st.data())
def test_repetition_penalty(logits, data):
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    found = sampling.repetition_penalty(1.3)(np.array(history, np.int64), logits)
    for index, value in enumerate(logits):
        expected = value if index not in history else value * np.float32(1.3) if value < 0 else value / np.float32(1.3)
        assert found[index] == expected


@given(logits=LOGITS, count=st.integers(1, 15))
def test_top_k(logits, count):
    found = sampling.top_k(count)(EMPTY, logits)
    smallest = sorted(logits, reverse=True)[min(count, len(logits)) - 1]
    assert found.tolist() == [value if value >= smallest else -np.inf for value in logits.tolist()]


@given(logits=LOGITS.filter(lambda values: len(set(values.tolist())) == len(values)), mass=st.floats(0.05, 0.95))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(logits, mass):
    kept = np.flatnonzero(np.isfinite(sampling.top_p(mass)(EMPTY, logits))).tolist()
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    p = probabilities(logits)
    assert sorted(order[: len(kept)]) == kept
    assert len(kept) >= 1
    assert sum(p[i] for i in order[: len(kept)]) >= mass - 1e-9
    assert len(kept) == 1 or sum(p[i] for i in order[: len(kept) - 1]) <= mass + 1e-9


@given(logits=LOGITS)
def test_softmax(logits):
    np.testing.assert_allclose(sampling.softmax(logits), probabilities(logits), rtol=1e-12)
    assert sampling.softmax(np.array([-np.inf, 0], np.float32)).tolist() == [0, 1]


@given(logits=LOGITS)
def test_log_softmax(logits):
    found = sampling.log_softmax(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log(probabilities(logits)), atol=1e-6, rtol=1e-6)
    assert sampling.log_softmax(np.array([-np.inf, 0], np.float32)).tolist() == [-np.inf, 0]


def test_the_order_is_that_of_transformers():
    """Each pair gives another result the other way round."""
    logits = np.array([4.0, 3.9, 1.0, -1.0], np.float32)
    config = GenerationConfig(do_sample=True, repetition_penalty=2.0, temperature=0.5, top_k=3, top_p=0.8, seed=1)
    sampler = Sampler(config)
    for process in sampler._processors:
        logits = process(np.array([0]), logits)
    # Penalty: [2, 3.9, 1, -1]; temperature: [4, 7.8, 2, -2]; top-k drops the last; top-p keeps only the best.
    assert logits.tolist() == [-np.inf, pytest.approx(7.8), -np.inf, -np.inf]


@given(logits=LOGITS, seed=st.integers(0, 3))
def test_greedy_takes_the_first_of_the_best(logits, seed):
    expected = logits.tolist().index(max(logits.tolist()))
    for config in (
        GenerationConfig(),
        GenerationConfig(do_sample=True, temperature=0.0, seed=seed),
        GenerationConfig(do_sample=True, top_k=1, seed=seed)
        if (logits == logits.max()).sum() == 1
        else GenerationConfig(),
    ):
        assert Sampler(config)(EMPTY, logits) == expected


def test_the_penalty_acts_without_drawing():
    logits = np.array([2.0, 1.5], np.float32)
    assert Sampler(GenerationConfig(repetition_penalty=2.0))(np.array([0]), logits) == 1


@settings(max_examples=30, deadline=None)
@given(logits=arrays(np.float32, 6, elements=st.floats(-3, 3, width=16)), seed=st.integers(0, 2**32))
def test_draws_follow_the_probabilities_and_the_seed(logits, seed):
    config = GenerationConfig(do_sample=True, seed=seed)
    sampler, again = Sampler(config), Sampler(config)
    drawn = [sampler(EMPTY, logits) for _ in range(2000)]
    assert drawn[:20] == [again(EMPTY, logits) for _ in range(20)]
    expected = np.array(probabilities(logits))
    found = np.bincount(drawn, minlength=6) / len(drawn)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / len(drawn)) + 1e-3).all()


@given(seed=st.integers(0, 1000))
def test_impossible_tokens_are_never_drawn(seed):
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    assert Sampler(GenerationConfig(do_sample=True, seed=seed))(EMPTY, logits) in (1, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad):
    with pytest.raises(MoiieError, match="logits are not finite"):
        Sampler(GenerationConfig())(EMPTY, np.array([0, bad], np.float32))
    with pytest.raises(MoiieError, match="logits are not finite"):
        Sampler(GenerationConfig())(EMPTY, np.full(3, -np.inf, np.float32))
