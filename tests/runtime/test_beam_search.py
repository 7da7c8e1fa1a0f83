"""Beam search against what transformers 4.37.2 answered, against the installed transformers, and against all answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from moiie_runtime.beam_search import BeamSearch, _largest
from moiie_runtime.errors import MoiieError
from moiie_runtime.generation_config import GenerationConfig
from moiie_runtime.sampling import log_softmax, repetition_penalty
from tests.runtime.beam_oracle import Case, cases

EMPTY = np.zeros(0, np.int64)
CASES = Path(__file__).parent / "beam_cases.json"
LogitsOf = Callable[[np.ndarray], np.ndarray]


def found(config: GenerationConfig, prompt: np.ndarray, logits: LogitsOf) -> tuple[int, ...]:
    """The answer after a prompt that the penalty counts, with logits computed from all ids of each beam."""
    search, rows = BeamSearch(config, prompt), prompt[None]
    steps = 0
    while not search.done:
        going_on = search.advance(logits(rows))
        rows = np.concatenate([np.broadcast_to(rows, (config.num_beams, rows.shape[1]))[going_on.sources],
                               going_on.tokens[:, None]], axis=1)  # fmt: skip
        steps += 1
    assert steps <= config.max_new_tokens
    return search.best()


def score(config: GenerationConfig, prompt: np.ndarray, logits: LogitsOf, answer: tuple[int, ...]) -> float:
    """What beam search calls the score of an answer, from its definition."""
    total = 0.0
    for length, token in enumerate(answer):
        ids = np.concatenate([prompt, np.array(answer[:length], np.int64)])
        penalised = repetition_penalty(config.repetition_penalty)(ids, log_softmax(logits(ids[None])[0]))
        total += float(penalised[token])
    return total / len(answer) ** config.length_penalty


def without_end(answer: tuple[int, ...], ends: tuple[int, ...]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, answer))


def config_of(case: Case) -> GenerationConfig:
    names = ("num_beams", "repetition_penalty", "length_penalty", "max_new_tokens")
    return GenerationConfig(**{name: getattr(case, name) for name in names}, eos_token_id=case.ends)


def test_answers_are_those_of_transformers_4_37_2():
    recorded = json.loads(CASES.read_text(encoding="utf-8"))
    assert [data for data, _ in recorded] == [json.loads(json.dumps(vars(case))) for case in cases()]
    for case, (_, expected) in zip(cases(), recorded, strict=True):
        answers = [found(config_of(case), np.array(prompt), case.logits) for prompt in case.prompts]
        assert (case, [without_end(answer, case.ends) for answer in answers]) == (case, expected)


def test_the_recorded_answers_are_of_every_kind():
    """Ends by an end token and by length; both penalties and more than one end token change some answer."""
    recorded = json.loads(CASES.read_text(encoding="utf-8"))
    lengths = [(len(answer), case["max_new_tokens"]) for case, answers in recorded for answer in answers]
    assert sum(length < longest for length, longest in lengths) > 20 < sum(length == most for length, most in lengths)
    for name, off in (("repetition_penalty", 1.0), ("length_penalty", 1.0), ("num_beams", 1)):
        changed = [
            case
            for case, (data, expected) in zip(cases(), recorded, strict=True)
            if data[name] != off and expected != [
                without_end(found(config_of(Case(**(vars(case) | {name: off}))), np.array(prompt), case.logits), case.ends)
                for prompt in case.prompts
            ]
        ]  # fmt: skip
        assert len(changed) > 10, name


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, bos_token_id=1, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_llama_answers_as_with_the_installed_transformers(llama, penalty, length_penalty):
    """Versions from 4.50 on end some searches a step earlier: then they may miss an answer with a better score."""

    @torch.no_grad()
    def logits(rows):
        return llama(torch.from_numpy(np.ascontiguousarray(rows))).logits[:, -1].numpy()

    same = 0
    random = np.random.default_rng(5)
    runs = list(itertools.product((2, 4), ((), (5,), (5, 9, 20)), range(2)))
    for beams, ends, _ in runs:
        prompt = random.integers(0, 24, random.integers(1, 6))
        shared = {"num_beams": beams, "repetition_penalty": penalty, "length_penalty": length_penalty}
        config = GenerationConfig(**shared, max_new_tokens=8, eos_token_id=ends)
        theirs = llama.generate(
            torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=8, eos_token_id=list(ends) or None, pad_token_id=0, **shared,
        )[0, len(prompt) :]  # fmt: skip
        ours, theirs = found(config, prompt, logits), tuple(theirs.tolist())
        same += ours == theirs
        if ours != theirs:
            assert score(config, prompt, logits, ours) > score(config, prompt, logits, theirs)
    assert same >= len(runs) - 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.integers(2, 4),
    length=st.integers(1, 3),
    ends=st.sampled_from([(), (0,), (1,)]),
    penalty=st.sampled_from([1.0, 1.5, 0.7]),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 3.0]),
)
def test_enough_beams_find_the_best_of_all_answers(seed, vocabulary, length, ends, penalty, length_penalty):
    def logits(rows):
        return np.stack([
            np.random.default_rng([seed, *row]).normal(size=vocabulary).astype(np.float32) * 3 for row in rows.tolist()
        ])  # fmt: skip

    config = GenerationConfig(
        num_beams=max(2, vocabulary**length),
        max_new_tokens=length,
        repetition_penalty=penalty,
        length_penalty=length_penalty,
        eos_token_id=ends,
    )
    prompt = np.array([1])
    answers = {
        tuple(without_end(tokens, ends)) + tuple(token for token in tokens if token in ends)[:1]
        for tokens in itertools.product(range(vocabulary), repeat=length)
    }
    best = max(answers, key=lambda answer: score(config, prompt, logits, answer))
    answer = found(config, prompt, logits)
    assert answer == best or score(config, prompt, logits, answer) == pytest.approx(
        score(config, prompt, logits, best), abs=1e-5
    )


def test_impossible_tokens_are_never_chosen():
    logits = np.full((3, 9), -np.inf, np.float32)
    logits[:, [2, 4, 5, 7]] = [0.1, 0.4, 0.2, 0.3]
    config = GenerationConfig(num_beams=3, max_new_tokens=6, repetition_penalty=1.5, eos_token_id=8)
    assert set(found(config, EMPTY, lambda rows: logits[: len(rows)])) <= {2, 4, 5, 7}


def test_of_equals_the_first_is_taken():
    values = np.array([1, 3, 3, 2, 3, -np.inf, 2], np.float32)
    assert _largest(values, 2).tolist() == [1, 2]
    assert _largest(values, 4).tolist() == [1, 2, 4, 3]
    assert _largest(values, 99).tolist() == [1, 2, 4, 3, 6, 0, 5]


def test_beams_start_as_one():
    """The first step chooses among the continuations of one prompt, not of as many equal ones as there are beams."""
    search = BeamSearch(GenerationConfig(num_beams=3, max_new_tokens=4), EMPTY)
    first = search.advance(np.array([[0, 5, 4, 3, 2]], np.float32))
    assert (first.sources.tolist(), first.tokens.tolist()) == ([0, 0, 0], [1, 2, 3])
    assert not search.done


def test_an_end_counts_only_among_as_many_candidates_as_there_are_beams():
    """Candidates 0, 3 and 7 are equal; 7 ends an answer too, but is the third of two."""
    logits = np.full((1, 9), -5, np.float32)
    logits[0, [0, 3, 7]] = 1
    search = BeamSearch(GenerationConfig(num_beams=2, max_new_tokens=4, eos_token_id=[0, 7]), EMPTY)
    assert search.advance(logits).tokens.tolist() == [3, 1]
    assert not search.done  # two finished answers would be enough
    found = BeamSearch(GenerationConfig(num_beams=3, max_new_tokens=4, eos_token_id=[0, 3, 7]), EMPTY)
    found.advance(logits)
    assert found.done


def test_nothing_but_end_tokens_is_an_error():
    search = BeamSearch(GenerationConfig(num_beams=2, eos_token_id=[0, 1, 2]), EMPTY)
    with pytest.raises(MoiieError, match="at least one token that does not end the answer; 3 of 3 do"):
        search.advance(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad):
    search = BeamSearch(GenerationConfig(num_beams=2), EMPTY)
    with pytest.raises(MoiieError, match="logits are not finite"):
        search.advance(np.array([[0, bad]], np.float32))
