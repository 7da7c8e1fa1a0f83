"""Prompts with pictures as decoder input, made by the checkpoint's model alone: no bundle is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moiie_export.bundle_manifest import IMAGE_MARKER
from moiie_export.families import family_of
from moiie_export.model.layerwise import Array, LayerByLayer, Row, Watcher
from moiie_export.parity.cases import Layout, Question, lay_out
from moiie_export.source import ModelSource
from moiie_runtime.chat import ChatTemplate
from moiie_runtime.errors import MoiieError
from moiie_runtime.fields import Fields
from moiie_runtime.images import Picture, load_image
from moiie_runtime.manifest import PromptSettings
from moiie_runtime.vision_settings import Encoder, read_encoders

KEPT = 64
"""Most positions of a prompt whose logits are computed; all of them would be gigabytes at a real vocabulary."""


@dataclass(frozen=True)
class Asked:
    """A question laid out for the decoder, its pictures decoded but not yet looked at.

    Attributes:
        name: for messages.
        layout: ids, picture positions, modalities.
        pictures: in the order of their placeholders.
        instruction: the question alone, which an instance router reads.
    """

    name: str
    layout: Layout
    pictures: tuple[Picture, ...]
    instruction: str


@dataclass(frozen=True)
class Look:
    """What a family makes of a question before its decoder.

    Attributes:
        features: rows of all pictures [images, tokens, H]; None without pictures.
        adapters: [L] the adapter of each layer that has some; None in a family without.
    """

    features: Array | None
    adapters: Array | None = None


def lay_out_questions(source: ModelSource, questions: Sequence[Question]) -> list[Asked]:
    """Text and pictures of every question.

    Raises:
        MoiieError: a picture that cannot be read, or a prompt that is longer than the model's context.
    """
    prompt = source.config.prompt
    settings = PromptSettings(prompt.system, prompt.stop_string, prompt.separator)
    template = ChatTemplate(prompt.template, settings, IMAGE_MARKER)
    asked = []
    for question in questions:
        text, images = template.render(question.messages)
        layout = lay_out(text, source)
        limit = source.config.text.max_position_embeddings
        if len(layout.modality) > limit:
            raise MoiieError(
                f"{question.name}: takes {len(layout.modality)} positions, the model has {limit}",
                "use a shorter prompt or fewer pictures",
            )
        pictures = tuple(Picture(load_image(image)) for image in images)
        asked.append(Asked(question.name, layout, pictures, template.questions(question.messages)[0]))
    return asked


def decoder_rows(parts: LayerByLayer, asked: Sequence[Asked], watcher: Watcher | None = None) -> list[Row]:
    """Decoder input of every question: the vision encoders run here, one after another."""
    looks = family_of(parts.source.config).looks(parts, asked, watcher)
    embedded = parts.embed([each.layout.ids[each.layout.ids >= 0] for each in asked])
    return [_row(each.layout, look, text) for each, look, text in zip(asked, looks, embedded, strict=True)]


def encoders_of(source: ModelSource) -> tuple[Encoder, ...]:
    """How pictures are made into the encoders' inputs."""
    sections = family_of(source.config).sections(source)
    fields = Fields(sections, "the model", hint="this is a defect of the exporter")
    return read_encoders(fields, source.config.image_tokens)


def _row(layout: Layout, look: Look, text: Array) -> Row:
    length = len(layout.is_image)
    embeds = np.empty((length, text.shape[1]), np.float32)
    embeds[~layout.is_image] = text
    if look.features is not None:
        embeds[layout.is_image] = look.features.reshape(-1, text.shape[1])
    kept = np.unique(np.linspace(0, length - 1, min(length, KEPT)).astype(np.int64))
    return Row(embeds, layout.modality, kept, look.adapters)
