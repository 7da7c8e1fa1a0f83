"""Lettered scenes and their questions: repeatable, split without overlap, right, balanced, and drawn where they say."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from moiie_recipes.demo.mome.held_out import held_out
from moiie_recipes.demo.mome.letters import LETTERS, LetteredScene, draw_lettered, make_lettered
from moiie_recipes.demo.mome.pictures import training_scene
from moiie_recipes.demo.mome.pretraining import cell_labels
from moiie_recipes.demo.mome.questions import ALL_TOPICS, KINDS, questions_of, sample
from moiie_recipes.demo.mome.word_lists import ASSISTANT, BOS, EOS, decoder_tokenizer, sentence_tokenizer
from moiie_recipes.demo.questions import NUMBERS
from moiie_recipes.demo.scenes import (
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    Scene,
    Thing,
    draw,
    make_scene,
    patch_labels,
    place,
)

EXAMPLE = LetteredScene(
    Scene((Thing(0, 0, "circle", "red"), Thing(1, 2, "square", "blue"), Thing(2, 1, "circle", "white")), "example"),
    ("K", None, "Z"),
)


def test_scenes_without_letters_are_what_the_other_demo_was_trained_on() -> None:
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for index in range(10):
            scene = make_scene(split, 3, index)
            digest.update(repr((scene, place(scene), patch_labels(scene, 6))).encode())
    assert digest.hexdigest() == "0e92ef4713e8db0fb9b8da4ef8f79e4bbf5760076bb74a9bd9f77008c5077e1b"


def test_the_same_numbers_give_the_same_picture_and_questions() -> None:
    for index in range(5):
        one, other = make_lettered("train", 7, index), make_lettered("train", 7, index)
        assert one == other
        assert draw_lettered(one).tobytes() == draw_lettered(other).tobytes()
        assert sample(one, 3, random.Random(index)) == sample(other, 3, random.Random(index))
    assert [item.question for item in held_out(30, 2)] == [item.question for item in held_out(30, 2)]


def test_no_scene_is_in_both_splits() -> None:
    train = {training_scene(0, index).scene.things for index in range(600)}
    test = {item.scene.scene.things for seed in (0, 1) for item in held_out(200, seed)}
    assert len(train) > 500
    assert len(test) > 350
    assert not train & test


def test_letters_are_drawn_in_the_cells_of_their_things_and_nowhere_else() -> None:
    bare, lettered = (np.asarray(picture).astype(int) for picture in (draw(EXAMPLE.scene), draw_lettered(EXAMPLE)))
    changed = np.abs(bare - lettered).sum(axis=2).reshape(3, 96, 3, 96).any(axis=(1, 3))
    expected = np.zeros((3, 3), bool)
    expected[0, 0] = expected[2, 1] = True
    np.testing.assert_array_equal(changed, expected)
    middle = lettered.reshape(3, 96, 3, 96, 3)[0, 24:72, 0, 24:72]
    assert middle.min() < 40, "dark ink"


def test_every_letter_looks_different() -> None:
    scenes = [LetteredScene(EXAMPLE.scene, (letter, None, None)) for letter in LETTERS]
    pictures = [np.asarray(draw_lettered(scene)).astype(int) for scene in scenes]
    for index, one in enumerate(pictures):
        for other in pictures[index + 1 :]:
            assert (np.abs(one - other).sum(axis=2) > 300).sum() > 80


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Which letter is on the red circle?", "K"),
        ("Which letter is on the white thing?", "Z"),
        ("Which letter is in the top left?", "K"),
        ("What colour is the square?", "blue"),
        ("What colour is the thing in the bottom centre?", "white"),
        ("What shape is the white thing?", "circle"),
        ("Where is the white circle?", "bottom centre"),
        ("How many circles are there?", "two"),
        ("How many things are there?", "three"),
        ("How many green things are there?", "zero"),
    ],
)
def test_answers_are_right(text: str, answer: str) -> None:
    asked = {question.text: question.answer for some in questions_of(EXAMPLE).values() for question in some}
    assert asked[text] == answer


def test_a_thing_is_asked_for_only_by_what_names_it_alone() -> None:
    asked = {question.text for some in questions_of(EXAMPLE).values() for question in some}
    assert "What colour is the circle?" not in asked
    assert "Which letter is on the square?" not in asked, "it has none"
    assert "What shape is the thing in the middle centre?" not in asked, "nothing is there"


def test_a_sample_is_of_one_topic_and_counts_differ() -> None:
    rng = random.Random(0)
    for index in range(100):
        scene = make_lettered("train", 0, index)
        questions = sample(scene, 3, rng)
        [topic] = [topic for topic, some in questions_of(scene).items() if set(questions) <= set(some)]
        assert topic in ALL_TOPICS
        assert len({question.text for question in questions}) == len(questions)
        if topic[0] == "count":
            assert len({question.answer for question in questions}) == len(questions)


def test_no_answer_is_much_likelier_than_the_others_of_its_kind() -> None:
    """A model that sees no picture must do badly."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for item in held_out(2000, 5):
        counts[item.question.kind][item.question.answer] += 1
    chance = {"colour": 1 / 6, "shape": 1 / 4, "position": 1 / 9, "count": 1 / 3, "letter": 1 / len(LETTERS)}
    for kind, answers in counts.items():
        assert answers.total() == 400
        assert answers.most_common(1)[0][1] / 400 < chance[kind] + 0.08, (kind, answers)


def test_cell_labels_say_what_is_where() -> None:
    letters = cell_labels(EXAMPLE, "letter")
    assert letters.tolist() == [1 + LETTERS.index("K"), 0, 0, 0, 0, 0, 0, 1 + LETTERS.index("Z"), 0]
    assert cell_labels(EXAMPLE, "shape")[5] == 1 + SHAPES.index("square")
    assert cell_labels(EXAMPLE, "colour")[0] == 1 + list(COLOURS).index("red")


def test_every_word_is_one_token_for_the_decoder() -> None:
    tokenizer = decoder_tokenizer()
    words = [*SHAPES, "crosses", *COLOURS, *ROWS, *COLUMNS, *NUMBERS]
    for word in [*words, *(f" {word}" for word in words), *LETTERS]:
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word
    assert tokenizer.encode("").ids == [tokenizer.token_to_id(BOS)]
    assert tokenizer.encode(EOS, add_special_tokens=False).ids == [tokenizer.token_to_id(EOS)]
    assert tokenizer.encode(f"?{ASSISTANT}").tokens[-1] == "Ġ", "the space at the end is a token"
    for text in ("Größe 大 \n\t?", "plain words nobody trained on"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_the_sentence_encoder_knows_every_word_of_the_questions() -> None:
    tokenizer = sentence_tokenizer()
    unknown = tokenizer.token_to_id("[UNK]")
    for item in held_out(200, 1):
        encoding = tokenizer.encode(item.question.text)
        assert unknown not in encoding.ids
        assert not [piece for piece in encoding.tokens if piece.startswith("##")], item.question.text
    assert tokenizer.encode("zebra crossing").tokens == [
        "[CLS]",
        "z",
        *(f"##{c}" for c in "ebra"),
        "cross",
        *(f"##{c}" for c in "ing"),
        "[SEP]",
    ]
