"""The PyTorch reference run over each golden case once, with everything it computed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moiie_export.model.decoder import DecoderOutput
from moiie_export.model.layers import KeyValue
from moiie_export.model.load import load_model
from moiie_export.model.vlm import VlmModel
from moiie_export.source import ModelSource

IMAGE = -200


def pixels(image: Path, side: int, aspect_ratio: str) -> np.ndarray:
    """Spec 5.1: [3, side, side] from a picture, by Pillow alone."""
    picture = Image.open(image).convert("RGB")
    if aspect_ratio == "pad":
        width, height = picture.size
        square = Image.new("RGB", (max(width, height),) * 2, (127, 127, 127))
        square.paste(picture, ((max(picture.size) - width) // 2, (max(picture.size) - height) // 2))
        picture = square
    values = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)).astype(np.float32) / np.float32(255)
    return ((values - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1).copy()


@dataclass
class Reference:
    """One golden case in PyTorch."""

    case: Any
    model: VlmModel
    captured: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def pixel_values(self) -> np.ndarray:
        """[n, 3, S, S]."""
        config = self.model.config
        return np.stack(
            [pixels(path, config.vision.input_size, config.image_aspect_ratio) for path in self.case.images]
        )

    @cached_property
    def vision(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected features [n, P, H], tower features [n, P, C]."""
        with torch.no_grad():
            projected, features = self.model.vision_encoder(torch.from_numpy(self.pixel_values))
        return projected, features

    @cached_property
    def types(self) -> np.ndarray:
        """1 for every row of an image, from the prompt's ids."""
        count = self.model.config.vision.image_tokens
        return np.concatenate([[1] * count if i == IMAGE else [0] for i in self.case.expected["input_ids"].tolist()])

    @cached_property
    def mask(self) -> np.ndarray:
        """Spec 2.1: a vision token is one whose neighbour on the right is an image token as well."""
        types = self.types
        return np.append((types[:-1] == 1) & (types[1:] == 1), False).astype(np.int32)

    @cached_property
    def embeds(self) -> torch.Tensor:
        """[T, H]."""
        rows, images = [], 0
        for token in self.case.expected["input_ids"].tolist():
            rows.append(self.vision[0][images] if token == IMAGE else self.embed([token]))
            images += token == IMAGE
        return torch.cat(rows)

    def embed(self, ids: list[int]) -> torch.Tensor:
        """[n, H]."""
        with torch.no_grad():
            embedded: torch.Tensor = self.model.embed_tokens(torch.tensor(ids))
        return embedded

    def call(
        self, embeds: torch.Tensor, mask: np.ndarray | None, past: int, cache: list[KeyValue], keep: Any = None
    ) -> DecoderOutput:
        """The decoder on one row: embeds [T, H], mask [T]."""
        modality = None if mask is None else torch.from_numpy(mask)[None]
        kept = None if keep is None else torch.as_tensor(keep)[None]
        with torch.no_grad():
            output: DecoderOutput = self.model.decoder(embeds[None], modality, torch.tensor([past]), kept, cache)
        return output

    def prefill(self, mask: np.ndarray) -> DecoderOutput:
        """The whole prompt with the given vision mask, logits of its last eight positions."""
        length = len(self.embeds)
        cache = self.model.new_cache(1, length + 16)
        return self.call(self.embeds, mask, 0, cache, np.arange(length - 8, length))

    @cached_property
    def prompt(self) -> DecoderOutput:
        """The prompt under the official mask; MoE inputs and outputs are captured as moe.L.input and moe.L.output."""
        handles = []
        for index, layer in enumerate(self.model.decoder.layers):
            if self.model.config.moe and index in self.model.config.moe.layers:
                handles.append(layer.mlp.register_forward_hook(self._capture(index)))
        try:
            return self.prefill(self.mask)
        finally:
            for handle in handles:
                handle.remove()

    def _capture(self, index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> None:
            self.captured[f"moe.{index}.input"] = [inputs[0]]
            self.captured[f"moe.{index}.output"] = [output[0]]

        return hook

    @cached_property
    def steps(self) -> tuple[list[int], list[np.ndarray], list[DecoderOutput]]:
        """Greedy decoding behind the prompt: 12 ids, the logits each was taken from, 11 decode outputs."""
        logits, cache, past = self.prompt.logits[0, -1], self.prompt.present, len(self.embeds)
        ids, taken, outputs = [], [], []
        for step in range(12):
            taken.append(logits.numpy())
            ids.append(int(logits.argmax()))
            if step == 11:
                break
            output = self.call(self.embed([ids[-1]]), None, past + step, cache)
            outputs.append(output)
            logits, cache = output.logits[0, -1], output.present
        return ids, taken, outputs


@pytest.fixture(scope="session")
def references() -> Iterator[Callable[[Any], Reference]]:
    """Golden case -> its reference run, made once whatever the order of the tests."""
    made: dict[str, Reference] = {}
    with ExitStack() as opened:

        def get(case: Any) -> Reference:
            if case.name not in made:
                source = opened.enter_context(ModelSource.open(case.checkpoint))
                made[case.name] = Reference(case, load_model(source))
            return made[case.name]

        yield get


@pytest.fixture
def reference(golden: Any, references: Callable[[Any], Reference]) -> Reference:
    """The reference run of each golden case in turn."""
    return references(golden)
