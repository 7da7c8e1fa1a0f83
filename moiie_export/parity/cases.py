"""The prompts that both sides answer: their own rule for tokens and modality, and the checkpoint's embeddings.

The bundle's processor makes text and pixels. What the decoders are fed is laid out here, independently, from the
checkpoint's config and tokenizer (spec moiie.md, 2.1 and 5.3), and the processor's layout is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from moiie_export.bundle_manifest import IMAGE_MARKER, IMAGE_PLACEHOLDER
from moiie_export.model_config import ModelConfig
from moiie_export.parity.metrics import Array
from moiie_export.parity.report import Check, tell
from moiie_export.recipe_parity import ParityCase
from moiie_export.source import ModelSource
from moiie_runtime.images import ImageSource
from moiie_runtime.prompt import Prompt


@dataclass(frozen=True)
class Question:
    """A prompt to compare: a short name, the text and the pictures."""

    name: str
    text: str
    images: tuple[ImageSource, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As the runtime takes it."""
        return [{"role": "user", "content": [*self.images, self.text]}]


@dataclass(frozen=True)
class Layout:
    """Where everything stands in the decoder's input, by the checkpoint's rules.

    Attributes:
        ids: prompt ids with placeholders [n].
        is_image: [T] bool, rows that hold picture features.
        modality: [T] int32, 1 = vision.
    """

    ids: Array
    is_image: Array
    modality: Array


def made_up() -> list[Question]:
    """One picture, text alone, two pictures: the same at every call."""
    return [
        Question("picture", "What is shown in the picture?", (_drawing(1, (160, 112)),)),
        Question("text", "Name three things that are larger than a house."),
        Question(
            "two pictures", "What differs between the two pictures?", (_drawing(2, (90, 150)), _drawing(3, (128, 70)))
        ),
    ]


def from_recipe(cases: Sequence[ParityCase]) -> list[Question]:
    """Questions of a recipe, named by their number."""
    return [Question(f"case {number}", case.prompt, case.images) for number, case in enumerate(cases, 1)]


def lay_out(text: str, source: ModelSource) -> Layout:
    """The decoder's positions for a complete prompt string with image markers."""
    config = source.config
    ids: list[int] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        ids += [IMAGE_PLACEHOLDER] if index else []
        for chunk in piece.split(config.prompt.separator) if config.prompt.separator else [piece]:
            found = list(source.tokenizer.encode(chunk).ids)
            starts_again = bool(ids) and found[:1] == ids[:1] == [config.bos_token_id]
            ids += found[1:] if starts_again else found
    types: list[bool] = []
    for token in ids:
        types += [True] * config.image_tokens if token == IMAGE_PLACEHOLDER else [False]
    return Layout(np.array(ids, np.int64), np.array(types, bool), _modality(types, config))


def _modality(types: list[bool], config: ModelConfig) -> Array:
    """Spec 2.1: vision when the token and the next one are image tokens; the last of the sequence never is."""
    if not config.last_image_token_is_language:
        return np.array(types, np.int32)
    followed = zip(types, [*types[1:], False], strict=True)
    return np.array([here and after for here, after in followed], np.int32)


def check_prompt(question: Question, prompt: Prompt, layout: Layout, config: ModelConfig) -> list[Check]:
    """The bundle's prompt against the checkpoint's layout: token ids, number of pictures, modality of every position."""
    place: dict[str, Any] = {"case": question.name}
    ids = (
        []
        if np.array_equal(prompt.input_ids, layout.ids)
        else [_first_difference(prompt.input_ids, layout.ids, "token id")]
    )
    pictures = (
        []
        if len(prompt.pictures) == len(question.images)
        else [f"{len(prompt.pictures)} pictures, expected {len(question.images)}"]
    )
    wrong = not np.array_equal(prompt.token_modality, layout.modality)
    lines = [_first_difference(prompt.token_modality, layout.modality, "modality")] if wrong else []
    layer = config.moe.layers[0] if wrong and config.moe else None
    where = "" if layer is None else f"layer {layer}"
    return [
        tell("prompt", [*ids, *pictures], **place),
        tell("modality", lines, where=where, layer=layer, **place),
    ]


def _first_difference(actual: Array, expected: Array, what: str) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} positions, expected {len(expected)}"
    wrong = np.flatnonzero(actual != expected)
    first = int(wrong[0])
    return f"{what} at position {first} is {actual[first]}, expected {expected[first]}; {len(wrong)} of {len(actual)} differ"


def _drawing(seed: int, size: tuple[int, int]) -> Image.Image:
    """A made-up picture: coloured shapes on a slope of colour."""
    random = np.random.default_rng(seed)
    width, height = size
    slope = np.linspace(random.integers(0, 256, (1, 3)), random.integers(0, 256, (1, 3)), width).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(slope[None, :, 0], (height, width, 3))))
    draw = ImageDraw.Draw(image)
    for index in range(7):
        left, top = int(random.integers(0, width - 20)), int(random.integers(0, height - 20))
        box = (left, top, left + int(random.integers(10, 60)), top + int(random.integers(10, 60)))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        (draw.ellipse if index % 2 else draw.rectangle)(box, fill=colour)
    return image
