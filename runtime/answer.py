"""One answer in the making: chooses tokens, decodes them, and knows when it is finished."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moiie_runtime.generation_config import GenerationConfig
from moiie_runtime.prompt import Prompt
from moiie_runtime.sampling import Logits, Sampler
from moiie_runtime.stopping import StopFilter
from moiie_runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "stop_string"]


class Answer:
    """The state of one row of a generation.

    Args:
        prompt: what is answered.
        config: how to choose tokens and when to stop.
        tokenizer: decodes the answer.
        stop_string: the template's separator; dropped from the end of the text.

    Attributes:
        token_ids: the tokens so far, the end token included.
        finish_reason: None while the answer is not finished.
    """

    def __init__(self, prompt: Prompt, config: GenerationConfig, tokenizer: Tokenizer, stop_string: str) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._config = config
        self._sampler = Sampler(config)
        self._detokenizer = tokenizer.detokenizer()
        self._filter = StopFilter(config.stop_strings, stop_string)
        text_ids = prompt.input_ids[prompt.input_ids >= 0]  # placeholders are no tokens
        self._history = np.concatenate([text_ids, np.zeros(config.max_new_tokens, np.int64)])
        self._history_length = len(text_ids)

    def take(self, logits: Logits) -> str:
        """Choose the next token from float32 [vocabulary] and return the text that became certain with it."""
        token = self._sampler(self._history[: self._history_length], logits)
        self._history[self._history_length] = token
        self._history_length += 1
        self.token_ids.append(token)
        text = self._filter.push(self._detokenizer.push(token))
        if self._filter.stopped:
            self.finish_reason = "stop_string"
        elif token in self._config.eos_token_id:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._config.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._filter.push(self._detokenizer.finish()) + self._filter.finish()
        return text
