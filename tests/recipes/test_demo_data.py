"""The picture-question set: repeatable, split without overlap, right, balanced, and drawn where it says."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from moiie_recipes.demo.held_out import held_out
from moiie_recipes.demo.questions import KINDS, NUMBERS, Question, ask, ask_many
from moiie_recipes.demo.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Scene, Thing, draw, make_scene, patch_labels
from moiie_recipes.demo.tokenizer import build_tokenizer

SCENES = [make_scene("train", 0, index) for index in range(400)]
EXAMPLE = Scene(
    (Thing(0, 0, "circle", "red"), Thing(1, 2, "square", "blue"), Thing(2, 1, "circle", "white")), "example"
)


def test_the_same_numbers_give_the_same_scene_picture_and_questions() -> None:
    for index in range(5):
        one, other = make_scene("train", 7, index), make_scene("train", 7, index)
        assert one == other
        assert draw(one).tobytes() == draw(other).tobytes()
        assert ask_many(one, 8, random.Random(index)) == ask_many(other, 8, random.Random(index))
    assert make_scene("train", 7, 0) != make_scene("train", 8, 0)
    assert [item.question for item in held_out(30, 2)] == [item.question for item in held_out(30, 2)]


def test_no_scene_is_in_both_splits() -> None:
    train = {scene.things for scene in SCENES} | {make_scene("train", 5, i, most=2).things for i in range(400)}
    test = {make_scene("test", seed, i).things for seed in (0, 1) for i in range(400)}
    test |= {make_scene("test", 0, i, most=2).things for i in range(200)}
    assert len(train) > 600
    assert len(test) > 600
    assert not train & test
    assert {item.scene.split for item in held_out(50, 0)} == {"test"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("What colour is the square?", "blue"),
        ("What shape is the white thing?", "circle"),
        ("Where is the red circle?", "top left"),
        ("Where is the square?", "middle right"),
        ("How many circles are there?", "two"),
        ("How many things are there?", "three"),
        ("How many green things are there?", "zero"),
        ("Is the red thing left of the square?", "yes"),
        ("Is the red thing above the square?", "yes"),
        ("Is the white circle above the blue square?", "no"),
    ],
)
def test_answers_are_right(text: str, answer: str) -> None:
    rng = random.Random(0)
    asked = {q.text: q.answer for kind in KINDS for _ in range(300) if (q := ask(EXAMPLE, kind, rng)) is not None}
    assert asked[text] == answer


def test_things_without_a_name_of_their_own_are_not_asked_for() -> None:
    twins = Scene((Thing(0, 0, "circle", "red"), Thing(1, 1, "circle", "red")), "twins")
    rng = random.Random(0)
    for kind in ("colour", "shape", "position", "comparison"):
        assert all(ask(twins, kind, rng) is None for _ in range(20))


def test_no_answer_is_much_likelier_than_the_others_of_its_kind() -> None:
    """A model that sees no picture must do badly: its best guess of a kind is right little more often than chance."""
    rng = random.Random(0)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for index in range(2000):
        scene = make_scene("train", 1, index)
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                counts[kind][question.answer] += 1
    chance = {"colour": 1 / 6, "shape": 1 / 4, "position": 1 / 9, "count": 1 / 3, "comparison": 1 / 2}
    for kind, answers in counts.items():
        best = answers.most_common(1)[0][1] / answers.total()
        assert best < chance[kind] + 0.05, (kind, answers)


def test_held_out_sets_have_equally_many_questions_of_each_kind_and_scenes_of_their_own() -> None:
    items = held_out(100, 3)
    assert Counter(item.question.kind for item in items) == dict.fromkeys(KINDS, 20)
    assert len({item.scene.style for item in items}) == 100
    assert held_out(100, 3)[0] != held_out(100, 4)[0]


def test_colours_are_where_the_scene_says() -> None:
    for scene in SCENES[:20]:
        pixels = np.asarray(draw(scene)).astype(int)
        for thing in scene.things:
            x, y = (int((where + 0.5) * pixels.shape[0] / 3) for where in (thing.column, thing.row))
            nearest = min(COLOURS, key=lambda name: np.abs(pixels[y, x] - COLOURS[name]).sum())
            assert nearest == thing.colour


def test_patch_labels_name_what_is_drawn() -> None:
    labels = np.array(patch_labels(EXAMPLE, 6)).reshape(6, 6)
    cells = labels.reshape(3, 2, 3, 2).max(axis=(1, 3))
    expected = np.zeros((3, 3), int)
    for thing in EXAMPLE.things:
        expected[thing.row, thing.column] = (
            1 + SHAPES.index(thing.shape) * len(COLOURS) + list(COLOURS).index(thing.colour)
        )
    np.testing.assert_array_equal(cells, expected)


def test_every_word_is_one_token_and_any_text_survives() -> None:
    tokenizer = build_tokenizer()
    for word in [*SHAPES, "crosses", *COLOURS, *ROWS, *COLUMNS, *NUMBERS, "yes", "no"]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1, word
    for text in ("Größe 大 \n\t?", "plain words nobody trained on"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text
    ids = tokenizer.encode("").ids
    assert ids == [tokenizer.token_to_id("<|begin_of_text|>")]


def test_questions_are_values() -> None:
    assert Question("count", "a", "b") == Question("count", "a", "b")
