"""One answer in the making: chooses tokens, decodes them, and knows when it is finished."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moiie_runtime.generation_config import GenerationConfig
from moiie_runtime.instance_routing import Instance
from moiie_runtime.prompt import Prompt
from moiie_runtime.sampling import History, Logits, Sampler
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
        used: int64 [n], ids that the repetition penalty counts as used before the first token.

    Attributes:
        prompt: what is answered.
        config: how to choose tokens and when to stop.
        token_ids: the tokens so far, the end token included.
        finish_reason: None while the answer is not finished.
        instance: what the instance router chose, once the prompt was run; None for bundles without one.
    """

    def __init__(
        self, prompt: Prompt, config: GenerationConfig, tokenizer: Tokenizer, stop_string: str, used: History
    ) -> None:
        self.prompt = prompt
        self.config = config
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.instance: Instance | None = None
        self._sampler = Sampler(config)
        self._detokenizer = tokenizer.detokenizer()
        self._filter = StopFilter(config.stop_strings, stop_string)
        self._history = np.concatenate([used, np.zeros(config.max_new_tokens, np.int64)])
        self._used = len(used)

    @property
    def history(self) -> History:
        """Ids that the repetition penalty counts as used, those of the answer so far among them."""
        return self._history[: self._used + len(self.token_ids)]

    def take(self, logits: Logits) -> str:
        """Choose the next token from float32 [vocabulary] and return the text that became certain with it."""
        return self.push(self._sampler(self.history, logits))

    def push(self, token: int) -> str:
        """Go on with this token and return the text that became certain with it."""
        self._history[self._used + len(self.token_ids)] = token
        self.token_ids.append(token)
        text = self._filter.push(self._detokenizer.push(token))
        if self._filter.stopped:
            self.finish_reason = "stop_string"
        elif token in self.config.eos_token_id:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.config.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._filter.push(self._detokenizer.finish()) + self._filter.finish()
        return text
