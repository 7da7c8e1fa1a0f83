"""A conversation as one prompt string with image markers, and its pictures in order (spec moiie.md, 5.2 and 5.3)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from moiie_runtime.errors import MoiieError
from moiie_runtime.images import ImageSource
from moiie_runtime.manifest import PromptSettings

Message = Mapping[str, Any]
_ROLES = ("system", "user", "assistant")
_CONTENT = 'content is a string, or a list of strings, images and {"type": "text" | "image", ...}'


class ChatTemplate:
    """The bundle's `chat_template.jinja`, rendered in a sandbox: a template is data from a stranger.

    Args:
        source: the template's text. It sees `system`, `messages` (role, content as a string), `stop_string` and
            `add_generation_prompt`, `image_marker` and `separator`.
        settings: the default system text, the stop string and the separator of pieces.
        image_marker: the text that stands for a picture, `<image>`.

    Raises:
        MoiieError: the template has a syntax error.
    """

    def __init__(self, source: str, settings: PromptSettings, image_marker: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        self._settings = settings
        self._marker = image_marker
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise _template_error(error) from error

    def render(self, messages: Sequence[Message]) -> tuple[str, list[ImageSource]]:
        """The prompt and the pictures it refers to.

        Args:
            messages: `{"role": ..., "content": ...}`, an optional system message first, then user and assistant in
                turn, ending with the user. Where a user's text holds markers, they take its pictures in order;
                otherwise each picture becomes a marker and a newline where it stands.

        Returns:
            The complete prompt, up to where the answer begins, and one picture for each marker in it.

        Raises:
            MoiieError: wrong roles or content, a message without text, a picture without a marker or the reverse.
        """
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
            raise MoiieError(
                "messages must be a list of messages with at least one", '[{"role": "user", "content": "a question"}]'
            )
        images: list[ImageSource] = []
        turns = [self._turn(index, message, images) for index, message in enumerate(messages)]
        system = self._settings.system
        if turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        _check_order(turns)
        prompt = self._render(system, turns)
        check_markers(prompt, self._marker, len(images), "the prompt made by chat_template.jinja")
        return prompt, images

    def questions(self, messages: Sequence[Message]) -> list[str]:
        """The texts of the user's turns without their pictures: what an instance router reads.

        Args:
            messages: a conversation that `render` accepts.
        """
        user = [message for message in messages if message["role"] == "user"]
        marked = [self._turn(index, message, [])["content"] for index, message in enumerate(user)]
        return [re.sub(re.escape(self._marker) + "\n?", "", text) for text in marked]

    def _render(self, system: str, turns: list[dict[str, str]]) -> str:
        try:
            return self._template.render(
                system=system,
                messages=turns,
                stop_string=self._settings.stop_string,
                add_generation_prompt=True,
                image_marker=self._marker,
                separator=self._settings.separator or "",
            )
        except MoiieError:
            raise
        except Exception as error:  # a template can raise whatever its expressions raise
            raise _template_error(error) from error

    def _turn(self, index: int, message: Message, images: list[ImageSource]) -> dict[str, str]:
        """One message with its content as a string; its pictures are appended to `images`."""
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES or "content" not in message:
            raise MoiieError(
                f"message {index} must have a role ({', '.join(_ROLES)}) and content, got {_shown(message)}", _CONTENT
            )
        where = f"message {index} ({message['role']})"
        content = message["content"]
        parts = [content] if isinstance(content, str) or _is_image(content) else content
        if not isinstance(parts, Sequence) or isinstance(parts, Mapping):
            raise MoiieError(f"{where}: content must be a string or a list, got {_shown(content)}", _CONTENT)
        parts = [_part(part, where) for part in parts]
        texts = [part for part in parts if isinstance(part, str)]
        found = [part for part in parts if not isinstance(part, str)]
        if found and message["role"] != "user":
            raise MoiieError(f"{where}: only the user's messages can hold pictures", "move the picture to the question")
        if message["role"] != "system" and not "".join(texts).replace(self._marker, "").strip():
            raise MoiieError(f"{where}: has no text", 'ask something, for example "Describe the picture."')
        separator = self._settings.separator
        if separator is not None and any(separator in text for text in texts):
            raise MoiieError(
                f"{where}: the text holds the control character {separator!r}, which parts the pieces of a prompt",
                "take it out",
            )
        images += found
        if any(self._marker in text for text in texts):
            check_markers("".join(texts), self._marker, len(found), where)
            return {"role": message["role"], "content": "".join(texts)}
        marked = [part if isinstance(part, str) else f"{self._marker}\n" for part in parts]
        return {"role": message["role"], "content": "".join(marked)}


def check_markers(text: str, marker: str, images: int, where: str) -> None:
    """Refuse a text whose number of image markers differs from the number of pictures.

    Raises:
        MoiieError: with both numbers.
    """
    markers = text.count(marker)
    if markers > images:
        raise MoiieError(
            f"{where}: has {markers} `{marker}` but {images} picture(s)",
            f"give a picture for each `{marker}`; the text itself cannot contain this marker",
        )
    if markers < images:
        raise MoiieError(
            f"{where}: has {images} pictures but {markers} `{marker}`",
            f"write one `{marker}` for each picture, or none at all to put them where they stand",
        )


def _check_order(turns: list[dict[str, str]]) -> None:
    for index, turn in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn["role"] != expected:
            raise MoiieError(
                f"the roles must be an optional system, then user and assistant in turn; "
                f"turn {index + 1} is {turn['role']!r} where {expected!r} is due"
            )
    if len(turns) % 2 == 0:
        raise MoiieError("the last message must be the user's", "end the conversation with a question")


def _part(part: Any, where: str) -> str | ImageSource:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        value = part.get("image", part.get("path"))
        if kind == "image" and value is not None:
            # A string here is a path; outside such an object it would be text.
            return Path(value) if isinstance(value, str) else value
    elif _is_image(part):
        return part  # type: ignore[no-any-return]
    raise MoiieError(
        f"{where}: a part of the content must be text or an image, got {_shown(part)}",
        'write {"type": "text", "text": "..."} or {"type": "image", "image": PATH}',
    )


def _is_image(value: Any) -> bool:
    return isinstance(value, (bytes, os.PathLike, Image.Image, np.ndarray))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise MoiieError(f"chat_template.jinja refuses this conversation: {message}")


def _template_error(error: Exception) -> MoiieError:
    line = getattr(error, "lineno", None)
    place = "chat_template.jinja" if line is None else f"chat_template.jinja:{line}"
    return MoiieError(f"{place}: {error}", "the bundle's chat template is broken: export the bundle again")
