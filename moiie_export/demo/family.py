"""What `moiie demo` asks of a model family: one record for each, so that nothing here asks for a model's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from moiie_export.model.layers import Adapter
    from moiie_recipes.demo.questions import Question
    from moiie_runtime.prompt import Prompt
    from moiie_runtime.vlm import VLM


class Asked(Protocol):
    """A question about a scene; what a scene is, only its family's `draw` knows."""

    @property
    def scene(self) -> Any:
        """The scene."""

    @property
    def question(self) -> Question:
        """The question with the only right answer."""


@dataclass(frozen=True)
class Inputs:
    """What the PyTorch decoder is given for right-padded prompts.

    Attributes:
        embeds: [B, T, H], the pictures' rows in place.
        modality: [B, T] int32; None where nothing is routed by modality.
        adapters: for every layer those of each row; None without adapters.
    """

    embeds: torch.Tensor
    modality: torch.Tensor | None
    adapters: list[Adapter | None] | None = None


@dataclass(frozen=True)
class Case:
    """A part taken away: `change` alters the prompts, `without` the model for as long as it is open."""

    name: str
    change: Callable[[list[Prompt]], list[Prompt]]
    without: AbstractContextManager[None]


@dataclass(frozen=True)
class DemoFamily:
    """The demo of one family.

    Attributes:
        name: what `moiie demo --family` takes.
        recipe: the shipped recipe that exports it.
        folder: of its checkpoint, below the recipes.
        training: the module that trains it.
        kinds: of questions, in the order of tables.
        held_out: (number, seed) -> questions that training never asks.
        draw: scene -> picture.
        several: seed -> a held-out scene and three questions about it.
        inputs: (model, the VLM whose preprocessing it shares, prompts) -> what the decoder is given.
        cases: model -> what to take away from it, one thing at a time.
    """

    name: str
    recipe: str
    folder: str
    training: str
    kinds: tuple[str, ...]
    held_out: Callable[[int, int], Sequence[Asked]]
    draw: Callable[[Any], Image]
    several: Callable[[int], tuple[Any, list[Question]]]
    inputs: Callable[[Any, VLM, Sequence[Prompt]], Inputs]
    cases: Callable[[Any], list[Case]]
