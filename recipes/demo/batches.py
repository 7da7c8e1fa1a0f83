"""Batches: each picture once, then several questions that all see the picture but not each other.

A row is [system text | picture | question 1 | question 2 | ...]; every question continues the picture's positions as if
it were alone, so that a row trains exactly what single questions would, at a fraction of the cost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer

from moiie_export.prompts import LLAMA3
from moiie_recipes.demo.architecture import PREPROCESSOR, TOWER
from moiie_recipes.demo.differentiable import Layout
from moiie_recipes.demo.questions import Kind, Question, ask_many
from moiie_recipes.demo.scenes import Scene, draw, make_scene, patch_labels
from moiie_recipes.demo.tokenizer import EOS
from moiie_runtime.prompt import token_modality

SEGMENT = 16
"""Positions of one question with its answer; no question of this set is longer."""


@dataclass(frozen=True)
class Batch:
    """pixel_values [B, 3, S, S]; ids [B, questions * SEGMENT] and labels (-100: no loss); valid: not padding."""

    pixel_values: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor


def make_layout(tokenizer: Tokenizer, questions: int) -> Layout:
    """The layout of rows with this many questions."""
    prefix = torch.tensor(tokenizer.encode(f"{LLAMA3.system}USER: ").ids)
    image_tokens = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
    length = image_tokens + questions * SEGMENT
    segment = torch.cat((torch.full((image_tokens,), -1), torch.arange(questions).repeat_interleave(SEGMENT)))
    index = torch.arange(length)
    mask = (index.unsqueeze(1) >= index) & ((segment == -1) | (segment.unsqueeze(1) == segment))
    own = torch.where(segment == -1, index, image_tokens + (index - image_tokens) % SEGMENT)
    types = (segment == -1).int().numpy()
    modality = token_modality(types, last_image_token_is_language=True)
    return Layout(prefix, image_tokens, torch.from_numpy(modality), len(prefix) + own, mask)


def encode_question(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """ids of everything behind the picture and of the answer with its end token, cut as the authors cut them."""
    prompt = tokenizer.encode(f"\n{question.text}ASSISTANT:", add_special_tokens=False).ids
    answer = tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids
    return prompt, [*answer, tokenizer.token_to_id(EOS)]


def pack(tokenizer: Tokenizer, scenes: list[Scene], questions: list[list[Question]]) -> Batch:
    """One batch of scenes with equally many questions each."""
    width = len(questions[0]) * SEGMENT
    ids = np.full((len(scenes), width), tokenizer.token_to_id(EOS), np.int64)
    labels = np.full((len(scenes), width), -100, np.int64)
    valid = np.zeros((len(scenes), width), bool)
    for row, asked in enumerate(questions):
        for index, question in enumerate(asked):
            prompt, answer = encode_question(tokenizer, question)
            start, total = index * SEGMENT, len(prompt) + len(answer) - 1
            ids[row, start : start + total] = (prompt + answer)[:-1]
            valid[row, start : start + total] = True
            labels[row, start + len(prompt) - 1 : start + total] = answer
    pixels = torch.from_numpy(np.stack([small_picture(scene) for scene in scenes]))
    return Batch(normalise(pixels), torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(valid))


def ask_batch(scenes: list[Scene], questions: int, kinds: tuple[Kind, ...], salt: str) -> list[list[Question]]:
    """Questions of these kinds about each scene, which depend only on the scenes and `salt`."""
    return [ask_many(scene, questions, random.Random(f"{salt}/{scene.style}"), kinds) for scene in scenes]  # noqa: S311


@cache
def training_scene(seed: int, index: int, most: int) -> Scene:
    """Training scene number `index` with at most `most` things."""
    return make_scene("train", seed, index, most)


@cache
def small_picture(scene: Scene) -> np.ndarray:
    """The picture at the model's size, uint8 [3, S, S]; kept, since scenes come again."""
    size = TOWER["image_size"]
    return np.asarray(draw(scene).resize((size, size), PREPROCESSOR["resample"])).transpose(2, 0, 1).copy()


@cache
def labels_of(scene: Scene) -> np.ndarray:
    """The patch labels of a scene, uint8 [patches * patches]."""
    return np.array(patch_labels(scene, TOWER["image_size"] // TOWER["patch_size"]), np.uint8)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as the processor gives them: -1 to 1."""
    return (pixels.float() / 255 - 0.5) / 0.5
