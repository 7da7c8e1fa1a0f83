from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moiie_export.prompts import LLAMA3, PHI3, PromptStyle
from moiie_runtime.chat import ChatTemplate
from moiie_runtime.errors import MoiieError
from moiie_runtime.manifest import PromptSettings

CAT, DOG = Path("cat.png"), Path("dog.png")
S = PHI3.system


def chat(style: PromptStyle = PHI3) -> ChatTemplate:
    return ChatTemplate(style.template, PromptSettings(style.system, style.stop_string), "<image>")


def user(content):
    return {"role": "user", "content": content}


def test_golden_prompts_come_out_exactly(golden):
    style = LLAMA3 if golden.about["conversation_template"] == "llama" else PHI3
    question = (golden.path / "inputs" / "question.txt").read_text(encoding="utf-8")
    expected = (golden.path / "inputs" / "prompt.txt").read_text(encoding="utf-8")
    assert chat(style).render([user([*golden.images, question])]) == (expected, golden.images)
    bare = question.replace("<image>\n", "")
    assert chat(style).render([user([*golden.images, bare])]) == (expected, golden.images)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (PHI3, f"{S} USER: <image>\nQ1 ASSISTANT: A1<|endoftext|>USER: Q2 ASSISTANT:"),
        (LLAMA3, f"{S}USER: <image>\nQ1ASSISTANT: A1<|end_of_text|>USER: Q2ASSISTANT:"),
    ],
)
def test_several_turns(style, expected):
    messages = [user([CAT, "Q1"]), {"role": "assistant", "content": "A1"}, user("Q2")]
    assert chat(style).render(messages) == (expected, [CAT])


def test_a_system_message_takes_the_place_of_the_default():
    assert chat().render([{"role": "system", "content": "Be brief."}, user("Q")])[0] == "Be brief. USER: Q ASSISTANT:"


@pytest.mark.parametrize(
    ("content", "text", "images"),
    [
        ([CAT, DOG, "Q"], "<image>\n<image>\nQ", [CAT, DOG]),
        (["Before ", CAT, "after"], "Before <image>\nafter", [CAT]),
        ([CAT, "Is <image> a cat?"], "Is <image> a cat?", [CAT]),
        (["<image> or ", DOG, CAT, "<image>?"], "<image> or <image>?", [DOG, CAT]),
        ([{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Q"}], "<image>\nQ", [CAT]),
        ([{"type": "image", "path": CAT}, "Q"], "<image>\nQ", [CAT]),
        (("Q", b"png"), "Q<image>\n", [b"png"]),
        ("line 1\nline 2 {{ x }} {% raw %}", "line 1\nline 2 {{ x }} {% raw %}", []),
    ],
)
def test_pictures_stand_where_they_are_put(content, text, images):
    assert chat().render([user(content)]) == (f"{S} USER: {text} ASSISTANT:", images)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("Q", "must be a list of messages"),
        ({"role": "user", "content": "Q"}, "must be a list of messages"),
        (["Q"], "message 0 must have a role"),
        ([{"role": "bot", "content": "Q"}], "message 0 must have a role"),
        ([{"role": "user"}], "message 0 must have a role"),
        ([user(None)], "content must be a string or a list"),
        ([user([3])], "a part of the content must be text or an image, got 3"),
        ([user([{"type": "video", "video": "x"}])], "a part of the content must be text or an image"),
        ([user([{"type": "image", "image": None}, "Q"])], "a part of the content must be text or an image"),
        ([user("")], r"message 0 \(user\): has no text"),
        ([user(" \n")], "has no text"),
        ([user([CAT])], "has no text"),
        ([user([CAT, "<image>"])], "has no text"),
        ([user("<image> Q")], r"has 1 `<image>` but 0 picture"),
        ([user([CAT, "<image> <image> Q"])], r"has 2 `<image>` but 1 picture"),
        ([user([CAT, DOG, "<image> Q"])], r"has 2 pictures but 1 `<image>`"),
        (
            [user("Q"), {"role": "assistant", "content": "<image> A"}, user("Q")],
            r"message 1 \(assistant\): has 1 `<image>`",
        ),
        (
            [user("Q"), {"role": "assistant", "content": [CAT, "A"]}, user("Q")],
            "only the user's messages can hold pictures",
        ),
        ([{"role": "system", "content": "S"}], "the last message must be the user's"),
        ([user("Q"), {"role": "assistant", "content": "A"}], "the last message must be the user's"),
        ([user("Q"), user("Q")], "turn 2 is 'user' where 'assistant' is due"),
        ([{"role": "assistant", "content": "A"}], "turn 1 is 'assistant' where 'user' is due"),
        ([user("Q"), {"role": "system", "content": "S"}, user("Q")], "turn 2 is 'system'"),
    ],
)
def test_conversations_that_cannot_be_used(messages, message):
    with pytest.raises(MoiieError, match=message):
        chat().render(messages)


def test_an_array_is_one_picture_and_not_a_list():
    array = np.zeros((2, 2, 3), np.uint8)
    _, images = chat().render([user([array, "Q"])])
    assert images[0] is array


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", r"chat_template\.jinja:1: Expected an expression"),
        ("{{ system.upper( }}", r"chat_template\.jinja:1"),
        ("{{ messages[0]['nothing'].x }}", "chat_template.jinja: .*has no attribute"),
        ("{{ raise_exception('no tools') }}", "refuses this conversation: no tools"),
        ("{{ ''.__class__.__mro__ }}", "chat_template.jinja: .*unsafe"),
        ("{{ messages.append(1) }}", "chat_template.jinja: .*unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "chat_template.jinja: Range too big"),
        ("{% include '/etc/passwd' %}", "chat_template.jinja"),
        ("{{ 1 / 0 }}", "chat_template.jinja: division by zero"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "made by chat_template.jinja: has 2 `<image>` but 1"),
    ],
)
def test_a_bad_or_hostile_template_is_a_clear_error(template, message):
    with pytest.raises(MoiieError, match=message):
        ChatTemplate(template, PromptSettings("", ""), "<image>").render([user([CAT, "Q"])])


SEPARATED = ChatTemplate(
    "{% for m in messages %}{{ m.content | replace(image_marker ~ '\n', '[' ~ image_marker ~ ']' ~ separator) }};{% endfor %}",
    PromptSettings("", "", "\x1e"),
    "<image>",
)


def test_a_template_knows_marker_and_separator():
    assert SEPARATED.render([user([CAT, "Q"])]) == ("[<image>]\x1eQ;", [CAT])
    without = ChatTemplate("{{ image_marker }}{{ separator }}|", PromptSettings("", ""), "<image>")
    assert without.render([user([CAT, "Q"])])[0] == "<image>|"


@pytest.mark.parametrize(
    "messages",
    [
        [user("a\x1eb")],
        [user([CAT, "Q", "\x1e"])],
        [user("Q"), {"role": "assistant", "content": "a\x1e"}, user("Q")],
        [{"role": "system", "content": "\x1e"}, user("Q")],
    ],
)
def test_no_text_of_a_conversation_can_hold_the_separator(messages):
    with pytest.raises(MoiieError, match=r"the text holds the control character '\\x1e'"):
        SEPARATED.render(messages)
    assert chat().render([user("a\x1eb")])[0].endswith("a\x1eb ASSISTANT:")  # a bundle that has none allows it


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ("Q", "Q"),
        ([CAT, "What is it?"], "What is it?"),
        (["Before ", CAT, "after"], "Before after"),
        ([CAT, "<image>\nWhat is it?"], "What is it?"),
        ([CAT, DOG, "Is <image> or <image> a cat?"], "Is  or  a cat?"),
        ([{"type": "image", "image": "cat.png"}, {"type": "text", "text": " two\nlines "}], " two\nlines "),
    ],
)
def test_questions_are_the_raw_texts_of_the_users_turns(content, question):
    turns = [user(content), {"role": "assistant", "content": "A"}, user("more?")]
    assert chat().questions(turns) == [question, "more?"]
    assert chat().questions([{"role": "system", "content": "S"}, *turns]) == [question, "more?"]
