"""Greedy answers of the PyTorch reference to many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moiie_export.demo.family import DemoFamily, Inputs
from moiie_runtime.prompt import Prompt
from moiie_runtime.vlm import VLM

BATCH = 50


@torch.inference_mode()
def greedy_ids(family: DemoFamily, model: Any, vlm: VLM, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """The tokens each prompt is continued with, without the end token; at most `new_tokens`.

    Args:
        family: the demo.
        model: its reference model.
        vlm: the bundle whose preprocessing and end tokens count.
        prompts: prompts with one picture each.
        new_tokens: where an answer is cut.
    """
    answers: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        answers += _batch(model, family.inputs(model, vlm, batch), batch, new_tokens, vlm.bundle.tokens.eos)
    return answers


def embed(table: nn.Module, prompts: Sequence[Prompt], pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Right-padded embeddings [B, T, H] of prompts, the rows of each one's picture [image_tokens, H] in place."""
    longest = max(prompt.length for prompt in prompts)
    embeds = torch.zeros(len(prompts), longest, pictures[0].shape[1])
    for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        [[place]] = np.argwhere(prompt.input_ids < 0)
        before, behind = (torch.from_numpy(part) for part in (prompt.input_ids[:place], prompt.input_ids[place + 1 :]))
        embeds[row, : prompt.length] = torch.cat([table(before), picture, table(behind)])
    return embeds


def _batch(
    model: Any, inputs: Inputs, prompts: Sequence[Prompt], new_tokens: int, eos: Sequence[int]
) -> list[list[int]]:
    lengths = torch.tensor([prompt.length for prompt in prompts])
    past = model.new_cache(len(prompts), int(lengths.max()) + new_tokens)
    last = (lengths - 1).unsqueeze(1)
    out = model.decoder(inputs.embeds, inputs.modality, torch.zeros_like(lengths), last, past, inputs.adapters)
    chosen = []
    for step in range(new_tokens):
        chosen.append(out.logits[:, -1].argmax(-1))
        if step + 1 < new_tokens:
            embedded = model.embed_tokens(chosen[-1]).unsqueeze(1)
            out = model.decoder(embedded, None, lengths + step, None, out.present, inputs.adapters)
    rows = torch.stack(chosen, dim=1).tolist()
    return [_until(row, eos) for row in rows]


def _until(row: list[int], eos: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(row) if token in eos]
    return row[: ends[0]] if ends else row
