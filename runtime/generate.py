"""Generation in three layers: steps over a batch, a stream of chunks for one answer, and whole answers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.answer import Answer, FinishReason
from moiie_runtime.decoder import Decoder, StepResult
from moiie_runtime.errors import MoiieError
from moiie_runtime.instance_routing import Instance
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.routing import LayerRouting, Routing

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Stats:
    """Counts and times so far.

    Attributes:
        prompt_tokens: positions of the prompt, those of pictures included.
        image_tokens: positions taken by pictures.
        new_tokens: tokens generated.
        prefill_seconds: from the prepared prompt to the first token, the vision encoder included.
        decode_seconds: time in all later steps. Neither loading a graph nor what the caller does between two chunks
            counts.
    """

    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first by the time they took; 0 when there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer; with beams the whole of it.

    Attributes:
        text: text that became certain, often empty; all pieces together are the answer.
        token_ids: the tokens that are new with this chunk.
        stats: counts and times so far.
        finish_reason: set on the last chunk: `stop` (end token), `length`, or `stop_string`.
    """

    text: str
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
        text: the answer, without special tokens, leading white space, or the string that ended it.
        token_ids: all tokens generated, the end token included.
        finish_reason: `stop` (end token), `length`, or `stop_string`.
        stats: counts and times.
        prefill_logits: float32 [1 or prompt_tokens, vocabulary]: of the last or of all positions, when recorded.
        step_logits: float32 [new tokens, vocabulary], row i is what token i was chosen from, when recorded.
        routing: the experts chosen, when recorded.
        instance: the weights and adapters chosen by the instruction; None for bundles without an instance router.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    prefill_logits: Floats | None = None
    step_logits: Floats | None = None
    routing: Routing | None = None
    instance: Instance | None = None

    @property
    def move_weights(self) -> Floats | None:
        """Weights of the vision encoders, [encoders]; None for bundles without an instance router."""
        return None if self.instance is None else self.instance.move_weights

    @property
    def mole_index(self) -> NDArray[np.int32] | None:
        """The adapter of each layer with adapters; None for bundles without an instance router."""
        return None if self.instance is None else self.instance.mole_index

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, those of pictures included."""
        return self.stats.prompt_tokens

    @property
    def image_tokens(self) -> int:
        """Positions of the prompt taken by pictures."""
        return self.stats.image_tokens

    @property
    def prefill_seconds(self) -> float:
        """Seconds from the prepared prompt to the first token."""
        return self.stats.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first by the time they took."""
        return self.stats.decode_tokens_per_second


@dataclass(frozen=True)
class Record:
    """What to keep beside the text.

    Attributes:
        prefill_logits: logits of the prompt, of its last position or of all.
        step_logits: the logits each token was chosen from.
        routing: the experts chosen.
    """

    prefill_logits: Literal["last", "all"] | None = None
    step_logits: bool = False
    routing: bool = False

    def __post_init__(self) -> None:
        if self.prefill_logits not in (None, "last", "all"):
            raise MoiieError(f'prefill_logits must be None, "last" or "all", got {self.prefill_logits!r}')


TEXT_ONLY = Record()


@dataclass(frozen=True)
class Step:
    """One step of a batch.

    Attributes:
        result: what the decoder gave; for the first step the prefill, otherwise one position a row.
        texts: new text of each row; None for rows that were finished before.
        prefill_seconds: time of the first step.
        decode_seconds: time of all later steps so far.
    """

    result: StepResult
    texts: tuple[str | None, ...]
    prefill_seconds: float
    decode_seconds: float


def needed_more_weights(answers: Sequence[Answer]) -> bool:
    """Whether prefill used weights, of encoders or the instance router, that later steps do not use."""
    return any(answer.prompt.pictures or answer.instance is not None for answer in answers)


def prefill(
    decoder: Decoder, answers: Sequence[Answer], cache: KVCache, record: Record
) -> tuple[StepResult, list[Floats], float]:
    """Load what is needed and run all prompts.

    Returns:
        What the decoder gave; the logits of each prompt's last position, [vocabulary]; and the time, of
        `time.perf_counter`, when it began, moved by what opening graphs took.
    """
    start = time.perf_counter() - decoder.opening_seconds
    prompts = [answer.prompt for answer in answers]
    all_logits = record.prefill_logits == "all"
    result = decoder.prefill(prompts, cache, all_logits=all_logits, routing=record.routing)
    last = [result.logits[row, prompt.length - 1 if all_logits else 0] for row, prompt in enumerate(prompts)]
    for answer, instance in zip(
        answers, result.instances, strict=False
    ):  # bundles without an instance router have none
        answer.instance = instance
    return result, last, start + decoder.opening_seconds


def generate_steps(
    decoder: Decoder, answers: Sequence[Answer], cache: KVCache, record: Record = TEXT_ONLY
) -> Generator[Step, None, None]:
    """Run a batch until every answer is finished, yielding after each token.

    Rows that finish early keep their state and are left out of `texts`.

    Args:
        decoder: runs the graphs.
        answers: one a row; they collect the tokens.
        cache: empty, with as many rows. It is released when the generator ends or is closed.
        record: whether to ask for all prompt logits and routing.
    """
    try:
        result, last, start = prefill(decoder, answers, cache, record)
        texts: tuple[str | None, ...] = tuple(answer.take(logits) for answer, logits in zip(answers, last, strict=True))
        prefill_seconds, decode_seconds = time.perf_counter() - start, 0.0
        yield Step(result, texts, prefill_seconds, decode_seconds)
        if needed_more_weights(answers):
            decoder.release_prefill_weights()
        if not all(answer.finish_reason for answer in answers):
            decoder.load("decoder_decode")
        while (active := np.array([answer.finish_reason is None for answer in answers])).any():
            start = time.perf_counter()
            tokens = [answer.token_ids[-1] for answer in answers]
            result = decoder.decode(tokens, cache, active=active, routing=record.routing)
            texts = tuple(
                answer.take(result.logits[row, 0]) if active[row] else None for row, answer in enumerate(answers)
            )
            decode_seconds += time.perf_counter() - start
            yield Step(result, texts, prefill_seconds, decode_seconds)
    finally:
        decoder.release(cache)


def stream(decoder: Decoder, answer: Answer, cache: KVCache) -> Iterator[Chunk]:
    """The pieces of one answer as they become certain, one chunk a token."""
    with closing(generate_steps(decoder, [answer], cache)) as steps:
        for step in steps:
            yield Chunk(step.texts[0] or "", (answer.token_ids[-1],), _stats(answer, step), answer.finish_reason)


def generate(
    decoder: Decoder, answers: Sequence[Answer], cache: KVCache, record: Record = TEXT_ONLY
) -> list[Generation]:
    """Whole answers, one for each row. See `generate_steps`."""
    recorders = [_Recorder(answer, row, record, decoder.num_experts) for row, answer in enumerate(answers)]
    with closing(generate_steps(decoder, answers, cache, record)) as steps:
        for step in steps:
            for recorder, text in zip(recorders, step.texts, strict=True):
                if text is not None:
                    recorder.add(step, text)
    return [recorder.result() for recorder in recorders]


class _Recorder:
    """Collects one row of the steps of a batch."""

    def __init__(self, answer: Answer, row: int, record: Record, num_experts: int) -> None:
        self._answer = answer
        self._num_experts = num_experts
        self._row = row
        self._record = record
        self._texts: list[str] = []
        self._logits: list[Floats] = []
        self._prefill_logits: Floats | None = None
        self._routing: list[dict[int, LayerRouting]] = []
        self._last: Step | None = None

    def add(self, step: Step, text: str) -> None:
        """Take this row's part of a step."""
        first = self._last is None
        self._last = step
        self._texts.append(text)
        length = self._answer.prompt.length if first else 1
        kept = step.result.logits[self._row][:length]
        if first and self._record.prefill_logits is not None:
            self._prefill_logits = kept.copy()
        if self._record.step_logits:
            self._logits.append(kept[-1].copy())
        if self._record.routing:
            layers = step.result.routing
            self._routing.append({layer: chosen[self._row, :length] for layer, chosen in layers.items()})

    def result(self) -> Generation:
        """The finished answer."""
        assert self._last is not None
        assert self._answer.finish_reason is not None
        return Generation(
            text="".join(self._texts),
            token_ids=tuple(self._answer.token_ids),
            finish_reason=self._answer.finish_reason,
            stats=_stats(self._answer, self._last),
            prefill_logits=self._prefill_logits,
            step_logits=np.stack(self._logits) if self._logits else None,
            routing=self._routed() if self._record.routing else None,
            instance=self._answer.instance,
        )

    def _routed(self) -> Routing:
        prefill, *decode = self._routing
        return Routing(
            token_modality=self._answer.prompt.token_modality,
            prefill=prefill,
            decode={layer: _joined([step[layer] for step in decode], prefill[layer]) for layer in prefill},
            num_experts=self._num_experts,
        )


def _joined(steps: Sequence[LayerRouting], like: LayerRouting) -> LayerRouting:
    """Steps [1, top_k] on top of each other; an empty one when the first token ended the answer."""
    return LayerRouting(
        np.concatenate([like.expert_ids[:0], *(step.expert_ids for step in steps)]),
        np.concatenate([like.expert_weights[:0], *(step.expert_weights for step in steps)]),
    )


def _stats(answer: Answer, step: Step) -> Stats:
    return answer_stats(answer, step.prefill_seconds, step.decode_seconds)


def answer_stats(answer: Answer, prefill_seconds: float, decode_seconds: float) -> Stats:
    """The counts of an answer with its times."""
    return Stats(
        prompt_tokens=answer.prompt.length,
        image_tokens=answer.prompt.image_tokens,
        new_tokens=len(answer.token_ids),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
    )
