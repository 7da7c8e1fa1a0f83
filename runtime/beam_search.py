"""Beam search for one request: from the logits of its beams to which beam goes on with which token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError
from moiie_runtime.generation_config import GenerationConfig
from moiie_runtime.sampling import History, Logits, check_logits, log_softmax, repetition_penalty

Ids = NDArray[np.int64]
_NO_BEAM = np.float32(-1e9)  # the score of beams that do not exist before the first step


@dataclass(frozen=True)
class Continuation:
    """How the beams of one request go on.

    Attributes:
        sources: int64 [num_beams]; new beam i is old beam `sources[i]` and its next token.
        tokens: int64 [num_beams], the next tokens.
    """

    sources: Ids
    tokens: Ids


class BeamSearch:
    """The search of one request. What it finds is what `generate` of transformers 4.37.2 finds with `early_stopping=False`.

    A beam's score is the sum of its tokens' log-probabilities, in float32, after the repetition penalty has acted on
    them. An answer is finished by an end token, or by `max_new_tokens`; its score is divided by its number of tokens,
    end token included, to the power `length_penalty`. The search keeps the `num_beams` best finished answers, and ends
    when the best candidate of a step, ended there, would be no better than the worst of them. With a length penalty
    above 0 a longer answer could still have been better: that is the rule of transformers, kept for equal answers.

    Args:
        config: `num_beams`, `length_penalty`, `repetition_penalty`, `max_new_tokens` and `eos_token_id` are used.
        history: ids that the repetition penalty counts as used before the first token.

    Attributes:
        done: whether the answer is certain.
    """

    def __init__(self, config: GenerationConfig, history: History) -> None:
        self._config = config
        self._beams = config.num_beams
        self._ends = frozenset(config.eos_token_id)
        penalty = config.repetition_penalty
        self._penalise = repetition_penalty(penalty) if penalty != 1 else None
        self._start = len(history)
        self._length = 0  # tokens of every beam
        self._ids = np.zeros((self._beams, self._start + config.max_new_tokens), np.int64)
        self._ids[:, : self._start] = history
        self._scores = np.full(self._beams, _NO_BEAM)
        self._scores[0] = 0
        self._finished = _Finished(self._beams, config.length_penalty)
        self.done = False

    def advance(self, logits: Logits) -> Continuation:
        """Take one step.

        Args:
            logits: float32 [num_beams, vocabulary] for the beams of the last continuation; at the first step
                [1, vocabulary], those of the prompt.

        Returns:
            How to go on, when not `done`.

        Raises:
            MoiieError: logits that are not numbers, or nothing but end tokens to choose from.
        """
        totals = self._scores[:, None] + self._log_probabilities(logits)
        vocabulary = totals.shape[1]
        chosen, total = [], totals.ravel()
        # Enough for as many tokens that end nothing as there are beams.
        candidates = _largest(total, (1 + len(self._ends)) * self._beams)
        for rank, index in enumerate(candidates):
            beam, token = divmod(int(index), vocabulary)
            if token not in self._ends:
                chosen.append(index)
            elif rank < self._beams:
                self._finished.add((*self._answer(beam), token), float(total[index]))
            if len(chosen) == self._beams:
                break
        else:
            raise MoiieError(
                f"beam search with {self._beams} beams needs at least one token that does not end the answer; "
                f"{len(self._ends)} of {vocabulary} do",
                "give fewer ids as eos_token_id",
            )
        found = np.array(chosen, np.int64)
        going_on = Continuation(found // vocabulary, found % vocabulary)
        self._extend(going_on, total[found])
        self._end(float(total[candidates[0]]))
        return going_on

    def best(self) -> tuple[int, ...]:
        """The tokens of the best finished answer, its end token included. Only when `done`."""
        return self._finished.best()

    def _log_probabilities(self, logits: Logits) -> Logits:
        """Of each beam's next token [num_beams, vocabulary]; all beams are the same before the first step."""
        check_logits(logits)
        rows = [log_softmax(row) for row in logits]
        if self._penalise is not None:
            used = self._ids[:, : self._start + self._length]
            rows = [self._penalise(ids, row) for ids, row in zip(used, rows, strict=False)]
        return np.broadcast_to(np.stack(rows), (self._beams, logits.shape[-1]))

    def _answer(self, beam: int) -> list[int]:
        answer: list[int] = self._ids[beam, self._start : self._start + self._length].tolist()
        return answer

    def _extend(self, going_on: Continuation, scores: Logits) -> None:
        end = self._start + self._length
        self._ids[:, self._start : end] = self._ids[going_on.sources, self._start : end]
        self._ids[:, end] = going_on.tokens
        self._scores = scores
        self._length += 1

    def _end(self, best: float) -> None:
        """Whether a step whose best candidate has this score was the last one."""
        if self._length < self._config.max_new_tokens:
            self.done = self._finished.cannot_improve(best, self._length)
            return
        for beam, score in enumerate(self._scores):
            self._finished.add(tuple(self._answer(beam)), float(score))
        self.done = True


class _Finished:
    """The best finished answers of one request."""

    def __init__(self, size: int, length_penalty: float) -> None:
        self._size = size
        self._length_penalty = length_penalty
        self._answers: list[tuple[float, tuple[int, ...]]] = []  # in the order they were found

    def add(self, token_ids: tuple[int, ...], score: float) -> None:
        """Keep an answer if there is room or if it is better than the worst."""
        item = (self._divided(score, len(token_ids)), token_ids)
        if len(self._answers) < self._size:
            self._answers.append(item)
        elif item[0] > (worst := min(self._answers, key=_score))[0]:
            self._answers.remove(worst)
            self._answers.append(item)

    def cannot_improve(self, best: float, length: int) -> bool:
        """Whether there is no room and a beam of this score and length, ended there, would not get in."""
        full = len(self._answers) == self._size
        return full and min(map(_score, self._answers)) >= self._divided(best, length)

    def best(self) -> tuple[int, ...]:
        """The best answer; of equals the one that was found last."""
        return max(reversed(self._answers), key=_score)[1]

    def _divided(self, score: float, length: int) -> float:
        return float(score / length**self._length_penalty)


def _score(answer: tuple[float, tuple[int, ...]]) -> float:
    return answer[0]


def _largest(values: Logits, count: int) -> Ids:
    """Indices of the `count` largest of values [n], falling; of equals the first."""
    count = min(count, len(values))
    smallest = np.partition(values, -count)[-count]
    found = np.flatnonzero(values >= smallest)
    return found[np.argsort(-values[found], kind="stable")[:count]]
