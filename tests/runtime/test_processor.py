from __future__ import annotations

import numpy as np
import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.processor import Processor

PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.fixture
def processor(manifest, write_bundle) -> Processor:
    return Processor(Bundle.open(write_bundle(manifest)))


def test_a_prompt_counts_positions(processor):
    prompt = processor([{"role": "user", "content": [PICTURE, "Compare", PICTURE]}])
    assert (prompt.input_ids == -200).sum() == 2
    assert prompt.image_tokens == 2 * 729
    assert prompt.length == len(prompt.input_ids) + 2 * 728 == len(prompt.token_modality)
    assert prompt.token_modality.dtype == np.int32
    assert prompt.token_modality.sum() == 2 * 728
    assert prompt.pixel_values.shape == (2, 3, 384, 384)


def test_the_rule_for_the_last_image_token_comes_from_the_bundle(manifest, write_bundle):
    manifest["modality"]["last_image_token_is_language"] = False
    prompt = Processor(Bundle.open(write_bundle(manifest))).from_text("<image>Q", [PICTURE])
    assert prompt.token_modality.sum() == 729


def test_text_alone(processor):
    prompt = processor([{"role": "user", "content": "Q"}])
    assert prompt.pixel_values is None
    assert prompt.image_tokens == 0
    assert not prompt.token_modality.any()


def test_a_complete_prompt_is_used_as_it_is(processor):
    prompt = processor.from_text("USER: <image>Q", [PICTURE])
    assert prompt.text == "USER: <image>Q"
    np.testing.assert_array_equal(prompt.input_ids, processor.tokenizer.encode("USER: <image>Q"))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("", [], "the prompt has no text"),
        ("<image> ", [PICTURE], "the prompt has no text"),
        (None, [], "the prompt has no text"),
        ("Q <image>", [], "has 1 `<image>` but 0 picture"),
        ("Q", [PICTURE], "has 1 pictures but 0 `<image>`"),
        ("Q \ud800", [], "not valid Unicode at character 2"),
    ],
)
def test_prompts_that_cannot_be_used(processor, text, images, message):
    with pytest.raises(MoiieError, match=message):
        processor.from_text(text, images)


def test_a_tokenizer_of_another_model_is_refused(manifest, write_bundle):
    manifest["model"]["vocab_size"] = 100
    with pytest.raises(MoiieError, match="but the model knows 100 tokens"):
        Processor(Bundle.open(write_bundle(manifest))).from_text("Describe the picture.")
