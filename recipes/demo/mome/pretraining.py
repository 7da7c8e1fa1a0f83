"""What is trained before anything is asked: the sentence encoder on topics, each tower on what is in its nature.

clip learns colours and how many things there are, dino shapes, pix2struct letters; each for every patch, as what stands in
the patch's cell, together with the place of that cell. Afterwards all four are frozen, so that each stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moiie_export.model.mome.model import MomeModel
from moiie_recipes.demo.mome.letters import LETTERS, LetteredScene
from moiie_recipes.demo.mome.pictures import Pixels, training_scene
from moiie_recipes.demo.mome.questions import ALL_TOPICS, questions_of
from moiie_recipes.demo.mome.settings import Settings
from moiie_recipes.demo.mome.word_lists import sentence_tokenizer
from moiie_recipes.demo.scenes import COLOURS, SHAPES

_SHARPNESS = 12.0
"""Cosines of sentence embeddings times this are the logits of topics."""

_NOTHING = 0.2
"""Weight of cells without anything, which are most: otherwise a tower first learns to say that there is nothing."""


@dataclass
class SentenceStage:
    """The sentence encoder learns to tell the topics of questions apart."""

    settings: Settings
    model: MomeModel
    name: str = "sentence"
    floor: float = 0.05

    def __post_init__(self) -> None:
        self.head = nn.Linear(self.model.config.sentence.hidden_size, len(ALL_TOPICS), bias=False)
        self.peak = 2 * self.settings.learning_rate
        self.tokenizer = sentence_tokenizer()

    @property
    def steps(self) -> int:
        """How many steps the stage takes."""
        return self.settings.sentence_steps

    def trained(self) -> dict[float, list[nn.Parameter]]:
        """The sentence encoder."""
        return {1.0: [*self.model.router.sentence_encoder.parameters(), *self.head.parameters()]}

    def orthogonal(self) -> frozenset[int]:
        """None."""
        return frozenset()

    @cached_property
    def texts(self) -> list[list[str]]:
        """Different questions by topic."""
        found: list[set[str]] = [set() for _ in ALL_TOPICS]
        for index in range(400):
            for topic, questions in questions_of(training_scene(self.settings.seed, index)).items():
                found[ALL_TOPICS.index(topic)] |= {question.text for question in questions}
        return [sorted(texts) for texts in found]

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the topic, each topic equally often."""
        rng = np.random.default_rng([self.settings.seed, step])
        topics = np.repeat(np.arange(len(ALL_TOPICS)), 6)
        texts = [self.texts[topic][rng.integers(len(self.texts[topic]))] for topic in topics]
        embedding = self.model.router.sentence_encoder(*sentence_batch(self.tokenizer, texts))
        logits = _SHARPNESS * embedding @ F.normalize(self.head.weight, dim=1).T
        target = torch.from_numpy(topics)
        right = (logits.argmax(1) == target).float().mean().item()
        return F.cross_entropy(logits, target), {"topics_right": right}

    def measure(self) -> dict[str, float]:
        """Nothing more."""
        return {}


def sentence_batch(tokenizer: object, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [b, t] of the sentence encoder, 0 behind the shorter texts."""
    rows = [tokenizer.encode(text).ids for text in texts]  # type: ignore[attr-defined]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids, mask


@dataclass
class TowerStage:
    """One tower learns what its `subject` says of every cell: "colour", "shape" or "letter"."""

    name: str
    subject: str
    settings: Settings
    model: MomeModel
    pictures: Mapping[str, Pixels]
    floor: float = 0.02

    def __post_init__(self) -> None:
        self.tower = self.model.get_submodule(f"vision_{self.name}.tower")
        values = len(VALUES[self.subject])
        self.sizes = [1 + values, 3, 3]
        self.head = nn.Linear(self.model.config.experts[0].tower.hidden_size, sum(self.sizes) + 6)
        self.peak = 1.5 * self.settings.learning_rate

    @property
    def steps(self) -> int:
        """How many steps the stage takes."""
        return int(getattr(self.settings, f"{self.name}_steps"))

    def trained(self) -> dict[float, list[nn.Parameter]]:
        """The tower."""
        return {1.0: [*self.tower.parameters(), *self.head.parameters()]}

    def orthogonal(self) -> frozenset[int]:
        """The matrices of its layers."""
        return frozenset(id(p) for name, p in self.tower.named_parameters() if p.dim() == 2 and "layers" in name)

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropies of the subject and of the place over all patches; where there is a class token, of the number."""
        size, seed = self.settings.pictures_per_step, self.settings.seed
        numbers = np.sort(np.random.default_rng([seed, step]).choice(self.settings.pictures, size, replace=False))
        scenes = [training_scene(seed, int(number)) for number in numbers]
        pixels = torch.from_numpy(self.pictures[self.name][numbers].astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = self.tower(pixels)
            logits = self.head(F.layer_norm(features, features.shape[-1:])).float()
        return self._losses(logits, scenes)

    def _losses(self, logits: torch.Tensor, scenes: list[LetteredScene]) -> tuple[torch.Tensor, dict[str, float]]:
        side = int(logits.shape[1] ** 0.5)
        first, patches = logits[:, : logits.shape[1] - side * side], logits[:, -side * side :].flatten(0, 1)
        cell = (torch.arange(side) * 3).div(side, rounding_mode="floor")
        row, column = cell.repeat_interleave(side), cell.repeat(side)
        truth = torch.from_numpy(np.stack([cell_labels(scene, self.subject) for scene in scenes]))
        subject = truth[:, row * 3 + column].flatten()
        targets = (subject, row.repeat(len(scenes)), column.repeat(len(scenes)))
        parts = patches.split([*self.sizes, 6], dim=1)
        rare = torch.ones(self.sizes[0])
        rare[0] = _NOTHING
        losses = [F.cross_entropy(parts[0], subject, rare)]
        losses += [0.5 * F.cross_entropy(part, target) for part, target in zip(parts[1:3], targets[1:], strict=True)]
        right = parts[0].argmax(1) == subject
        numbers = {
            "things_right": right[subject > 0].float().mean().item(),
            "rest_right": right[subject == 0].float().mean().item(),
        }
        if first.shape[1]:
            count = torch.tensor([len(scene.letters) for scene in scenes])
            losses.append(0.3 * F.cross_entropy(first[:, 0, -6:], count))
            numbers["number_right"] = (first[:, 0, -6:].argmax(1) == count).float().mean().item()
        return torch.stack(losses).sum(), numbers

    def measure(self) -> dict[str, float]:
        """Nothing more."""
        return {}


VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "letter": LETTERS}


def cell_labels(scene: LetteredScene, subject: str) -> np.ndarray:
    """int64 [9]: of each cell 0 where nothing is to be said, else 1 + the index of its colour, shape or letter."""
    labels = np.zeros(9, np.int64)
    for thing, letter in scene.things:
        value = letter if subject == "letter" else getattr(thing, subject)
        if value is not None:
            labels[thing.row * 3 + thing.column] = 1 + VALUES[subject].index(value)
    return labels


@torch.no_grad()
def tower_features(model: MomeModel, pictures: Mapping[str, Pixels]) -> dict[str, torch.Tensor]:
    """Expert -> what its tower gives for all pictures [n, P, C], float16."""
    found = {}
    for expert in model.config.experts:
        tower, pixels = model.get_submodule(f"{expert.component}.tower"), pictures[expert.name]
        starts = range(0, len(pixels), 64)
        batches = [tower(torch.from_numpy(pixels[i : i + 64].astype(np.float32))).half() for i in starts]
        found[expert.name] = torch.cat(batches)
    return found
