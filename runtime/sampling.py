"""From logits to a token: processors in the order transformers applies them, then the best token or a draw."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError
from moiie_runtime.generation_config import GenerationConfig

Logits = NDArray[np.float32]
History = NDArray[np.int64]
LogitsProcessor = Callable[[History, Logits], Logits]


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """Lower the logits of every id in the history: divided by `penalty` when positive, multiplied when negative."""

    def apply(history: History, logits: Logits) -> Logits:
        result = logits.copy()
        ids = np.unique(history)
        scores = result[ids]
        result[ids] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
        return result

    return apply


def temperature(value: float) -> LogitsProcessor:
    """Divide all logits by `value`."""
    return lambda _, logits: logits / np.float32(value)


def top_k(count: int) -> LogitsProcessor:
    """Keep the `count` largest logits, and those equal to the smallest of them."""

    def apply(_: History, logits: Logits) -> Logits:
        kept = min(count, len(logits))
        smallest = np.partition(logits, -kept)[-kept]
        return np.where(logits < smallest, np.float32(-np.inf), logits)

    return apply


def top_p(mass: float) -> LogitsProcessor:
    """Keep the most likely tokens until their probabilities reach `mass`, at least one."""

    def apply(_: History, logits: Logits) -> Logits:
        order = np.argsort(logits, kind="stable")  # rising, as transformers sorts: ties fall the same way
        below = np.cumsum(softmax(logits[order]))
        dropped = order[below <= 1.0 - mass]
        result = logits.copy()
        result[dropped[dropped != order[-1]]] = -np.inf
        return result

    return apply


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities of finite or -inf logits; the sum of 32000 of them needs float64."""
    weights: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    return weights


def log_softmax(logits: Logits) -> Logits:
    """Logarithms of the probabilities of finite or -inf logits."""
    shifted: Logits = logits - logits.max()
    total = np.exp(shifted, dtype=np.float64).sum()
    shifted -= np.float32(np.log(total))
    return shifted


def check_logits(logits: Logits) -> None:
    """Refuse float32 [..., vocabulary] in which a row leaves no choice.

    Raises:
        MoiieError: values that are not numbers, which means damaged weights or a broken graph.
    """
    if np.isnan(logits).any() or not np.isfinite(logits.max(axis=-1)).all():
        raise MoiieError(
            "the decoder's logits are not finite",
            "check the bundle with `moiie inspect --verify` and `moiie parity`",
        )


class Sampler:
    """Chooses one token after another for one row.

    Args:
        config: what to apply. Without drawing only the repetition penalty acts.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self._greedy = config.greedy
        self._processors: list[LogitsProcessor] = []
        if config.repetition_penalty != 1:
            self._processors.append(repetition_penalty(config.repetition_penalty))
        if self._greedy:
            return
        self._random = np.random.default_rng(config.seed)
        if config.temperature != 1:
            self._processors.append(temperature(config.temperature))
        if config.top_k:
            self._processors.append(top_k(config.top_k))
        if config.top_p < 1:
            self._processors.append(top_p(config.top_p))

    def __call__(self, history: History, logits: Logits) -> int:
        """The next token.

        Args:
            history: ids that the repetition penalty counts as used.
            logits: float32 [vocabulary].

        Raises:
            MoiieError: logits that are not numbers; see `check_logits`.
        """
        check_logits(logits)
        for process in self._processors:
            logits = process(history, logits)
        if self._greedy:
            return int(logits.argmax())
        total = np.cumsum(softmax(logits))
        # Side "right" never lands on a token of probability 0; the clip catches rounding at the very end.
        drawn = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        return min(drawn, int(np.flatnonzero(np.diff(total, prepend=0.0))[-1]))
