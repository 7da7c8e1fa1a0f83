"""Greedy answers of the PyTorch reference to many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moiie_export.model.vlm import VlmModel
from moiie_runtime.prompt import Prompt

BATCH = 50


@torch.inference_mode()
def greedy_ids(model: VlmModel, prompts: Sequence[Prompt], new_tokens: int, eos: Sequence[int]) -> list[list[int]]:
    """The tokens each prompt is continued with, without the end token; at most `new_tokens`.

    Args:
        model: the reference model.
        prompts: prompts with one picture each.
        new_tokens: where an answer is cut.
        eos: ids that end an answer.
    """
    answers: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        answers += _batch(model, prompts[start : start + BATCH], new_tokens, eos)
    return answers


def _batch(model: VlmModel, prompts: Sequence[Prompt], new_tokens: int, eos: Sequence[int]) -> list[list[int]]:
    lengths = torch.tensor([prompt.length for prompt in prompts])
    embeds, modality = _inputs(model, prompts)
    past = model.new_cache(len(prompts), int(lengths.max()) + new_tokens)
    out = model.decoder(embeds, modality, torch.zeros_like(lengths), (lengths - 1).unsqueeze(1), past)
    chosen = []
    for step in range(new_tokens):
        chosen.append(out.logits[:, -1].argmax(-1))
        if step + 1 < new_tokens:
            embedded = model.embed_tokens(chosen[-1]).unsqueeze(1)
            out = model.decoder(embedded, None, lengths + step, None, out.present)
    rows = torch.stack(chosen, dim=1).tolist()
    return [_until(row, eos) for row in rows]


def _inputs(model: VlmModel, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded embeddings [B, T, H] with the pictures' rows in place, and modality [B, T]."""
    longest = max(prompt.length for prompt in prompts)
    pixels = np.concatenate([prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None])
    features, _ = model.vision_encoder(torch.from_numpy(pixels))
    embeds = torch.zeros(len(prompts), longest, features.shape[2])
    modality = torch.zeros(len(prompts), longest, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        [[place]] = np.argwhere(prompt.input_ids < 0)
        before, behind = prompt.input_ids[:place], prompt.input_ids[place + 1 :]
        parts = [
            model.embed_tokens(torch.from_numpy(before)),
            features[row],
            model.embed_tokens(torch.from_numpy(behind)),
        ]
        embeds[row, : prompt.length] = torch.cat(parts)
        modality[row, : prompt.length] = torch.from_numpy(prompt.token_modality)
    return embeds, modality


def _until(row: list[int], eos: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(row) if token in eos]
    return row[: ends[0]] if ends else row
