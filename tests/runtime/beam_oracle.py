"""Beam search by transformers over made-up logits, and the numbers of its version 4.37.2.

The version whose results the project keeps is older than the one that is installed, and newer ones end some searches a
step earlier. `beam_cases.json` holds what 4.37.2 answered; in an environment with it, torch and numpy:

    python -m tests.runtime.beam_oracle > tests/runtime/beam_cases.json
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

PERIOD = 5


@dataclass(frozen=True)
class Case:
    """One call of `generate`; `ends` are the end tokens, `bias` is added to their logits."""

    seed: int
    vocabulary: int
    prompts: tuple[tuple[int, ...], ...]
    num_beams: int
    repetition_penalty: float
    length_penalty: float
    max_new_tokens: int
    ends: tuple[int, ...]
    bias: float

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """float32 [rows, vocabulary] after ids [rows, length]."""
        by_last, by_second = tables(self)
        second = rows[:, -2] if rows.shape[1] > 1 else np.zeros(len(rows), np.int64)
        return by_last[rows.shape[1] % PERIOD, rows[:, -1]] + by_second[second]


@functools.lru_cache(maxsize=1)
def tables(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logits by position and last token, and what the token before it adds."""
    random = np.random.RandomState(case.seed)  # a frozen stream: the same numbers with every numpy
    by_last = 2 * random.standard_normal((PERIOD, case.vocabulary, case.vocabulary)).astype(np.float32)
    by_second = random.standard_normal((case.vocabulary, case.vocabulary)).astype(np.float32)
    by_last[..., list(case.ends)] += np.float32(case.bias)
    return by_last, by_second


class Oracle(PreTrainedModel, GenerationMixin):
    """A model whose logits are computed by a function of all ids so far: int64 [rows, length] -> [rows, vocabulary]."""

    config_class = PretrainedConfig

    def __init__(self, vocabulary: int, logits: Any) -> None:
        super().__init__(PretrainedConfig(vocab_size=vocabulary))
        self._compute = logits
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.from_numpy(self._compute(input_ids.numpy()))[:, None])


def search(model: Oracle, prompts: Sequence[Sequence[int]], ends: Sequence[int], **settings: Any) -> list[list[int]]:
    """What `generate` answers to prompts of one length, without end tokens and padding."""
    ids = torch.tensor(prompts)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=False,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        **settings,
    )
    answers = found[:, ids.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, answer)) for answer in answers]


def answer(case: Case) -> list[list[int]]:
    """What the installed transformers answers to a case."""
    return search(
        Oracle(case.vocabulary, case.logits),
        case.prompts,
        case.ends,
        num_beams=case.num_beams,
        repetition_penalty=case.repetition_penalty,
        length_penalty=case.length_penalty,
        max_new_tokens=case.max_new_tokens,
    )


def cases() -> list[Case]:
    """Many small searches: start token or prompt, both penalties on either side of 1 and 0, early and late ends."""
    made = []
    random = np.random.RandomState(0)
    for beams, penalty, length in itertools.product((2, 3, 5), (1.0, 1.5, 0.8), (-1.0, 0.0, 0.5, 1.0, 2.0)):
        for bias in (-1.0, 1.0, 3.0):
            vocabulary = int(random.randint(12, 40))
            prompts = random.randint(3, vocabulary, (int(random.randint(1, 3)), int(random.randint(1, 5))))
            made.append(
                Case(
                    seed=len(made),
                    vocabulary=vocabulary,
                    prompts=tuple(tuple(map(int, row)) for row in prompts),
                    num_beams=beams,
                    repetition_penalty=penalty,
                    length_penalty=length,
                    max_new_tokens=int(random.randint(1, 13)),
                    ends=((2,), (2,), (2, 7), ())[int(random.randint(4))],
                    bias=bias,
                )
            )
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = ",\n".join(json.dumps([vars(case), answer(case)]) for case in cases())
    sys.stdout.write(f"[\n{lines}\n]\n")
