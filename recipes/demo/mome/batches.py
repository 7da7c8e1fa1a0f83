"""Batches of the decoder: each row a picture and a few questions of one topic, which see the picture but not each other.

A row is [prefix | picture | suffix | question 1 | question 2 | ...]. In a MoME the picture's rows and the adapters depend on
the question, so a row's questions share the decisions of the first of them: the sentence encoder was taught topics, and
within a topic it gives nearly the same embedding. At inference every question decides for itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from moiie_recipes.demo.mome.differentiable import Layout
from moiie_recipes.demo.mome.letters import LetteredScene
from moiie_recipes.demo.mome.pretraining import sentence_batch
from moiie_recipes.demo.mome.questions import KINDS, sample
from moiie_recipes.demo.mome.word_lists import ASSISTANT, EOS, PREFIX, SUFFIX
from moiie_recipes.demo.questions import Kind, Question

SEGMENT = 16
"""Positions of one question with its answer; no question of this set is longer."""


@dataclass(frozen=True)
class Batch:
    """ids [B, questions * SEGMENT] and labels (-100: no loss); the deciding question of each row as word pieces."""

    ids: torch.Tensor
    labels: torch.Tensor
    sentence: tuple[torch.Tensor, torch.Tensor]


def make_layout(tokenizer: Tokenizer, image_tokens: int, questions: int) -> Layout:
    """The layout of rows with this many questions."""
    prefix = torch.tensor(tokenizer.encode(PREFIX).ids)
    suffix = torch.tensor(tokenizer.encode(SUFFIX, add_special_tokens=False).ids)
    shared = len(prefix) + image_tokens + len(suffix)
    segment = torch.cat((torch.full((shared,), -1), torch.arange(questions).repeat_interleave(SEGMENT)))
    index = torch.arange(len(segment))
    mask = (index.unsqueeze(1) >= index) & ((segment == -1) | (segment.unsqueeze(1) == segment))
    positions = torch.where(segment == -1, index, shared + (index - shared) % SEGMENT)
    return Layout(prefix, image_tokens, suffix, positions, mask)


def encode_question(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """ids of everything behind the suffix and of the answer with its end token, each tokenised apart (spec mome.md, 3)."""
    prompt = tokenizer.encode(question.text + ASSISTANT, add_special_tokens=False).ids
    answer = tokenizer.encode(question.answer, add_special_tokens=False).ids
    return prompt, [*answer, tokenizer.token_to_id(EOS)]


def pack(tokenizers: tuple[Tokenizer, Tokenizer], questions: Sequence[list[Question]], most: int) -> Batch:
    """One batch of rows with up to `most` questions; `tokenizers` are the decoder's and the sentence encoder's."""
    words, pieces = tokenizers
    ids = np.full((len(questions), most * SEGMENT), words.token_to_id(EOS), np.int64)
    labels = np.full_like(ids, -100)
    for row, asked in enumerate(questions):
        for index, question in enumerate(asked):
            prompt, answer = encode_question(words, question)
            start, total = index * SEGMENT, len(prompt) + len(answer) - 1
            ids[row, start : start + total] = (prompt + answer)[:-1]
            labels[row, start + len(prompt) - 1 : start + total] = answer
    sentence = sentence_batch(pieces, [asked[0].text for asked in questions])
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), sentence)


def ask_batch(
    scenes: Sequence[LetteredScene], most: int, salt: str, kinds: tuple[Kind, ...] = KINDS
) -> list[list[Question]]:
    """Questions about each scene, which depend only on the scenes and `salt`."""
    return [
        sample(scene, most, random.Random(f"{salt}/{row}/{scene.scene.style}"), kinds)  # noqa: S311 (no secret)
        for row, scene in enumerate(scenes)
    ]
