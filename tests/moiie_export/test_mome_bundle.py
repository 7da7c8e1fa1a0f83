"""The authors' end-to-end numbers through an exported bundle and the runtime (spec mome.md; tests/golden/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import moiie_runtime
from moiie_runtime import VLM, Record
from moiie_runtime.generate import Generation
from tests.exports import exported_mome
from tests.mome_layout import GOLDEN

CASE: dict[str, Any] = json.loads((GOLDEN / "case.json").read_text(encoding="utf-8"))
PLAIN: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def vlm() -> Iterator[VLM]:
    with moiie_runtime.load(exported_mome(max_context=640).bundle, threads=1) as loaded:
        yield loaded


def messages(sample: int) -> list[dict[str, Any]]:
    picture = Image.open(GOLDEN / CASE["images"][sample])
    return [{"role": "user", "content": [picture, CASE["questions"][sample]]}]


def close(actual: np.ndarray, wanted: np.ndarray) -> None:
    tolerance = CASE["suggested_tolerance"]
    np.testing.assert_allclose(actual, wanted, atol=tolerance["atol"], rtol=tolerance["rtol"])


@pytest.fixture(scope="module")
def greedy(vlm: VLM) -> Generation:
    return vlm.generate(messages(0), record=Record(prefill_logits="all", step_logits=True), **PLAIN)


@pytest.mark.parametrize("sample", [0, 1])
def test_prompt_ids(vlm: VLM, sample: int) -> None:
    """Pieces are tokenised apart, the start token stands once, the space at the end is a token."""
    ids = CASE["prompt_ids"]
    marker = vlm.bundle.tokens.image_placeholder
    found = vlm.processor(messages(sample)).input_ids.tolist()
    assert found == [*ids["before"], marker, *ids["after"], *ids[f"question{sample}"]]


def test_instance_routing(greedy: Generation, expected: dict[str, np.ndarray]) -> None:
    assert greedy.instance is not None
    close(greedy.instance.move_weights, expected["move.weights"])
    assert greedy.instance.mole_index.tolist() == expected["mole.expert_per_layer"].tolist()


def test_rows_of_the_picture(vlm: VLM, expected: dict[str, np.ndarray]) -> None:
    """The class token as it is, below it the weighted sum; the rest of the input is the embedding table."""
    prompt = vlm.processor(messages(0))
    rows = vlm.image_features(prompt)[0]
    close(rows[0], expected["clip.projected"][0])
    close(rows[1:], expected["move.output"])
    start = len(CASE["prompt_ids"]["before"])
    close(rows, expected["inputs_embeds"][start : start + len(rows)])


def test_logits(greedy: Generation, expected: dict[str, np.ndarray]) -> None:
    assert greedy.prefill_logits is not None
    assert greedy.step_logits is not None
    close(greedy.prefill_logits[-8:], expected["prefill_logits"])
    close(greedy.step_logits, expected["step_logits"])


def test_greedy_tokens(greedy: Generation, expected: dict[str, np.ndarray]) -> None:
    assert [1, *greedy.token_ids] == expected["greedy_ids"].tolist()
    assert greedy.text.strip() == CASE["texts"]["greedy"][0].strip()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"repetition_penalty": 1.5}, "greedy_penalty1.5_ids"),
        ({"num_beams": 5}, "beam5_penalty1.0_ids"),
        ({"num_beams": 5, "repetition_penalty": 1.5}, "beam5_penalty1.5_ids"),
    ],
)
def test_other_decodings(vlm: VLM, expected: dict[str, np.ndarray], settings: dict[str, Any], name: str) -> None:
    found = vlm.generate(messages(0), **{**PLAIN, **settings})
    assert [1, *found.token_ids] == expected[name].tolist()


def test_the_bundle_decodes_as_the_authors_do(vlm: VLM, expected: dict[str, np.ndarray]) -> None:
    """5 beams, penalty 1.5, and a length that counts the start token: nothing of it is said here."""
    found = vlm.generate(messages(0))
    assert [1, *found.token_ids][:13] == expected["beam5_penalty1.5_ids"].tolist()


def test_a_batch_of_two(vlm: VLM, expected: dict[str, np.ndarray]) -> None:
    """Different pictures, questions, lengths and adapters."""
    found = vlm.generate_batch([messages(0), messages(1)], **PLAIN)
    assert [[1, *each.token_ids] for each in found] == expected["batch2.greedy_ids"].tolist()
    chosen = [each.instance.mole_index.tolist() for each in found if each.instance is not None]
    assert chosen == expected["batch2.mole_expert_per_layer"].tolist()
    for row, each in enumerate(found):
        assert each.instance is not None
        sizes = expected["batch2.move_mean_abs_contribution"][row]
        assert each.instance.contributions is not None
        close(each.instance.contributions, sizes / sizes.sum())


def test_a_second_question_runs_no_encoder(vlm: VLM) -> None:
    vlm.generate(messages(0), **{**PLAIN, "max_new_tokens": 1})
    misses, hits = vlm.feature_cache.misses, vlm.feature_cache.hits
    again = [{"role": "user", "content": [Image.open(GOLDEN / CASE["images"][0]), "What else?"]}]
    vlm.generate(again, **{**PLAIN, "max_new_tokens": 1})
    assert vlm.feature_cache.misses == misses
    assert vlm.feature_cache.hits == hits + 3
