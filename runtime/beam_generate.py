"""Answers by beam search: every prompt is run once, its beams are decoded side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from moiie_runtime.answer import Answer
from moiie_runtime.beam_search import BeamSearch, Continuation
from moiie_runtime.decoder import Decoder
from moiie_runtime.generate import (
    TEXT_ONLY,
    Chunk,
    Floats,
    Generation,
    Record,
    answer_stats,
    needed_more_weights,
    prefill,
)
from moiie_runtime.kv_cache import KVCache


def generate_beams(
    decoder: Decoder, answers: Sequence[Answer], cache: KVCache, record: Record = TEXT_ONLY
) -> list[Generation]:
    """Whole answers, one for each request; each is what it would be alone.

    Stop strings act on the answer that was found: what follows one is dropped.

    Args:
        decoder: runs the graphs.
        answers: one a request, with equal `num_beams`; they get the tokens that were found.
        cache: empty, with as many requests and beams. It is released in the end.
        record: whether to keep the logits of the prompt. Steps are those of several beams, so their logits and routing
            are not recorded.
    """
    searches = [BeamSearch(answer.config, answer.history) for answer in answers]
    try:
        result, last, start = prefill(decoder, answers, cache, record)
        cache.spread()
        steps = [search.advance(logits[None]) for search, logits in zip(searches, last, strict=True)]
        prefill_seconds = time.perf_counter() - start
        recorded: list[Floats | None] = [None] * len(answers)
        if record.prefill_logits is not None:
            recorded = [result.logits[row, : answer.prompt.length].copy() for row, answer in enumerate(answers)]
        del result, last
        if needed_more_weights(answers):
            decoder.release_prefill_weights()
        decode_seconds = _decode(decoder, cache, searches, steps)
    finally:
        decoder.release(cache)
    return [
        _generation(answer, search, (prefill_seconds, seconds), logits)
        for answer, search, seconds, logits in zip(answers, searches, decode_seconds, recorded, strict=True)
    ]


def stream_beams(decoder: Decoder, answer: Answer, cache: KVCache) -> Iterator[Chunk]:
    """One answer in a single chunk: no token of it is certain before the search is over."""
    [found] = generate_beams(decoder, [answer], cache)
    yield Chunk(found.text, found.token_ids, found.stats, found.finish_reason)


def _decode(decoder: Decoder, cache: KVCache, searches: Sequence[BeamSearch], steps: list[Continuation]) -> list[float]:
    """Take steps until every search is done. Returns the seconds that passed until each one was."""
    batch, beams = cache.batch, cache.num_beams
    total, seconds = 0.0, [0.0] * batch
    while running := [request for request, search in enumerate(searches) if not search.done]:
        decoder.load("decoder_decode")
        start = time.perf_counter()
        sources = np.arange(batch * beams).reshape(batch, beams)
        tokens = np.zeros((batch, beams), np.int64)
        active = np.zeros((batch, beams), np.bool_)
        for request in running:
            sources[request] = request * beams + steps[request].sources
            tokens[request] = steps[request].tokens
            active[request] = True
        cache.reorder(sources.ravel())
        logits = decoder.decode(tokens.ravel().tolist(), cache, active=active.ravel()).logits
        for request in running:
            steps[request] = searches[request].advance(logits[request * beams : (request + 1) * beams, 0])
        total += time.perf_counter() - start
        for request in running:
            seconds[request] = total
    return seconds


def _generation(
    answer: Answer, search: BeamSearch, seconds: tuple[float, float], prefill_logits: Floats | None
) -> Generation:
    texts = []
    for token in search.best():
        texts.append(answer.push(token))
        if answer.finish_reason is not None:  # at the last token, or earlier at a stop string
            break
    assert answer.finish_reason is not None
    return Generation(
        text="".join(texts),
        token_ids=tuple(answer.token_ids),
        finish_reason=answer.finish_reason,
        stats=answer_stats(answer, *seconds),
        prefill_logits=prefill_logits,
        instance=answer.instance,
    )
