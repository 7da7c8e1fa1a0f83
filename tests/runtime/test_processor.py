from __future__ import annotations

import numpy as np
import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.images import Picture
from moiie_runtime.processor import Processor
from tests.conftest import GoldenCase
from tests.runtime import instance_bundle as made

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


def test_pixel_values_are_made_when_they_are_asked_for(processor, monkeypatch):
    monkeypatch.setattr("moiie_runtime.prompt.pixel_values", lambda *_: pytest.fail("were made"))
    prompt = processor.from_text("<image>Q", [PICTURE])
    assert isinstance(prompt.pictures[0], Picture)
    assert prompt.pictures[0].image.size == (6, 4)
    with pytest.raises(pytest.fail.Exception, match="were made"):
        _ = prompt.pixel_values


@pytest.fixture
def instance_processor(tmp_path) -> Processor:
    return Processor(Bundle.open(made.write(tmp_path / "bundle")))


MOME = GoldenCase("mome/end_to_end")


@pytest.mark.parametrize("sample", [0, 1])
def test_pieces_give_the_authors_ids(instance_processor, sample):
    question, ids = MOME.about["questions"][sample], MOME.about["prompt_ids"]
    prompt = instance_processor([{"role": "user", "content": [MOME.images[sample], question]}])
    expected = [*ids["before"], -200, *ids["after"], *ids[f"question{sample}"]]
    assert prompt.input_ids.tolist() == expected
    assert prompt.instruction == question
    raw = instance_processor.from_text(prompt.text, [MOME.images[sample]], question)
    assert raw.input_ids.tolist() == expected


def test_a_question_alone_begins_with_one_start_token_and_ends_with_the_space(instance_processor):
    ids = instance_processor([{"role": "user", "content": "Please describe this image in short."}]).input_ids.tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert ids[-38:] == MOME.about["prompt_ids"]["question0"]


def test_the_instruction_is_the_first_question_or_the_last(instance_processor):
    turns = [
        {"role": "user", "content": [PICTURE, "What is this?"]},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "Where is it?"},
    ]
    assert instance_processor(turns).instruction == "What is this?"
    assert instance_processor(turns, reroute=True).instruction == "Where is it?"


def test_an_empty_question_is_refused_before_the_router_sees_it(instance_processor):
    for content in ("", "  ", [PICTURE], [PICTURE, "<image>"]):
        with pytest.raises(MoiieError, match="has no text"):
            instance_processor([{"role": "user", "content": content}])
