"""MoME's golden cases, and the PyTorch reference run over the end-to-end one once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from moiie_export.model.decoder import DecoderOutput
from moiie_export.model.layers import Adapter
from moiie_export.model.mome.encoders import visual_tokens
from moiie_export.model.mome.model import MomeModel
from moiie_export.model.mome.router import InstanceRouting
from tests.mome_golden import STEPS, MomeCase, golden_model, minilm, patches, pooling_matrix, sentence_tokens, squashed


@pytest.fixture(scope="session")
def mome_case() -> Callable[[str], MomeCase]:
    """mome_case("adt") -> the case."""
    return MomeCase


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """Directory of the real sentence encoder."""
    return minilm()


@pytest.fixture(scope="session")
def tokenize() -> Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]:
    """tokenize(sentences) -> input_ids, attention_mask."""
    return sentence_tokens


@dataclass
class EndToEnd:
    """One sample of the end-to-end case in PyTorch, piece by piece."""

    case: MomeCase
    model: MomeModel
    sample: int
    probes: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.open(self.case.path / self.case.about["images"][self.sample]).convert("RGB")

    @cached_property
    def clip_pixels(self) -> torch.Tensor:
        """[1, 3, 224, 224]."""
        return squashed(self.image, 224)

    @cached_property
    def dino_pixels(self) -> torch.Tensor:
        """[1, 3, 448, 448]."""
        return squashed(self.image, 448)

    @cached_property
    def patches(self) -> tuple[torch.Tensor, tuple[int, int]]:
        """Flattened patches [1, P, 770] and the grid."""
        return patches(self.image)

    @cached_property
    def features(self) -> list[torch.Tensor]:
        """image_features of the three experts; probes are filled on the way, under the golden names."""
        model, probes = self.model, self.probes
        handle = model.vision_clip.norm.register_forward_hook(_keep(probes, "clip.norm"))
        flat, grid = self.patches
        matrix, size = pooling_matrix(grid, (16, 16)).unsqueeze(0), torch.tensor([[float(grid[1]), float(grid[0])]])
        clip, probes["clip.tower"] = model.vision_clip(self.clip_pixels)
        handle.remove()
        dino, *inner = model.vision_dino(self.dino_pixels)
        probes.update(zip(("dino.patch_tokens", "dino.pooled", "dino.adt"), inner, strict=True))
        pix, *inner = model.vision_pix2struct(flat, matrix, size)
        probes.update(zip(("pix.last_hidden_state", "pix.pooled", "pix.adt"), inner, strict=True))
        for name, value in (("clip", clip), ("dino", dino), ("pix", pix)):
            probes[f"{name}.projected"] = value
        return [clip, dino, pix]

    @cached_property
    def routing(self) -> InstanceRouting:
        """What the question decides."""
        routing: InstanceRouting = self.model.router(*sentence_tokens([self.case.about["questions"][self.sample]]))
        return routing

    @cached_property
    def embeds(self) -> torch.Tensor:
        """inputs_embeds [T, H]."""
        ids = self.case.about["prompt_ids"]
        visual = visual_tokens(self.routing.move_weights, self.features, self.model.config.queries)[0]
        after = ids["after"] + ids[f"question{self.sample}"]
        return torch.cat([self.embed(ids["before"]), visual, self.embed(after)])

    def embed(self, ids: list[int]) -> torch.Tensor:
        """[n, H]."""
        embedded: torch.Tensor = self.model.embed_tokens(torch.tensor(ids))
        return embedded

    @cached_property
    def adapters(self) -> list[Adapter | None]:
        """The adapters the question chose."""
        return self.model.mole.choose(self.routing.mole_index)

    @cached_property
    def prompt(self) -> DecoderOutput:
        """The decoder over the prompt, logits of its last eight positions."""
        length = len(self.embeds)
        keep = torch.arange(length - 8, length)[None]
        cache = self.model.new_cache(1, length + STEPS)
        output: DecoderOutput = self.model.decoder(
            self.embeds[None], None, torch.zeros(1, dtype=torch.int64), keep, cache, self.adapters
        )
        return output

    @cached_property
    def steps(self) -> tuple[list[int], torch.Tensor]:
        """Greedy ids behind the prompt, and the logits each was taken from."""
        logits, cache, past, ids, taken = self.prompt.logits[0, -1], self.prompt.present, len(self.embeds), [], []
        for step in range(STEPS):
            taken.append(logits)
            ids.append(int(logits.argmax()))
            if step + 1 < STEPS:
                position = torch.tensor([past + step])
                out = self.model.decoder(self.embed(ids[-1:])[None], None, position, None, cache, self.adapters)
                logits, cache = out.logits[0, -1], out.present
        return ids, torch.stack(taken)


def _keep(into: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        into[name] = output

    return hook


@pytest.fixture(scope="session")
def end_to_end_case() -> MomeCase:
    """The case."""
    return MomeCase("end_to_end")


@pytest.fixture(scope="session")
def golden_mome(end_to_end_case: MomeCase) -> MomeModel:
    """Its model."""
    return golden_model(end_to_end_case)


@pytest.fixture(scope="session")
def samples(end_to_end_case: MomeCase, golden_mome: MomeModel) -> list[EndToEnd]:
    """Both samples; everything is computed once, when asked for."""
    return [EndToEnd(end_to_end_case, golden_mome, number) for number in range(2)]
