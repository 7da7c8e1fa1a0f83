"""The decoders against the reference: each prompt through prefill and decode, two of them as one batch, a full cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moiie_export.parity.graphs import BundleGraphs
from moiie_export.parity.judgement import judge_measure, judge_ties
from moiie_export.parity.measure import Measure, measure, worst
from moiie_export.parity.metrics import Array
from moiie_export.parity.reference import Inputs, Reference, ReferenceRun
from moiie_export.parity.report import Check
from moiie_export.parity.trace import Trace
from moiie_export.recipe_parity import Bounds
from moiie_runtime.adapters import Adapters
from moiie_runtime.bundle import Bundle
from moiie_runtime.kv_cache import KVCache

KEPT = 64
"""Most positions of a prompt whose logits are compared; all of them would be gigabytes at a real vocabulary."""
CHUNK = 6
"""Tokens of the chunk that is run behind an almost full cache, before one decode step."""
_PADDING = 3.0
"""What rows are padded with in a batch: nothing may read it."""


@dataclass(frozen=True)
class CaseRun:
    """What one case left: checks, measured phases, and the reference's side for the stages after it.

    Attributes:
        inputs: prefill inputs.
        prefill, first_step: the reference's run of the prompt and of the token after it.
        tokens: greedy ids of the reference, one more than there are steps.
        token_logits: logits [V] that each was taken from.
    """

    checks: list[Check]
    measures: dict[str, Measure]
    inputs: Inputs
    prefill: ReferenceRun
    first_step: ReferenceRun
    tokens: list[int]
    token_logits: list[Array]


class DecoderStage:
    """Compares the two decoder graphs with the reference.

    Args:
        bundle: gives shapes.
        graphs: the bundle's marked graphs.
        reference: the PyTorch model.
        bounds: what differences are allowed.
        steps: decode steps of each case.
    """

    def __init__(self, bundle: Bundle, graphs: BundleGraphs, reference: Reference, bounds: Bounds, steps: int) -> None:
        self._bundle, self._graphs, self._reference, self._bounds = bundle, graphs, reference, bounds
        self._steps = steps
        self._experts = 0 if bundle.model.moe is None else bundle.model.moe.num_experts
        self._adapters = None if bundle.adapters is None else Adapters(bundle, bundle.adapters)

    def case(self, name: str, inputs: Inputs, advance: Callable[[], None]) -> CaseRun:
        """One prompt: prefill, then greedy steps of the reference, each fed to both sides on the reference's cache."""
        length = len(inputs.embeds)
        cache = self._cache([inputs])
        modality = np.asarray(inputs.modality)
        actual = self._graphs.prefill(inputs.embeds[None], modality[None], inputs.kept[None], cache).row(0, length)
        past = self._reference.model.new_cache(1, length + self._steps)
        prefill = self._reference.run(inputs, past, _choices(actual))
        measures = {"prefill": self._measure(actual, prefill, inputs)}
        advance()
        tokens, logits, runs, steps = [], [prefill.trace.logits[-1]], [prefill], []
        _teach(cache, 0, prefill.trace, (0, length))
        for step in range(self._steps):
            tokens.append(int(logits[-1].argmax()))
            cache.lengths[:] = length + step
            row = self._reference.embed(np.array([tokens[-1]]))
            actual = self._graphs.decode(row[None], cache).row(0, 1)
            at = Inputs(row, None, length + step, np.zeros(1, np.int64), inputs.adapters)
            run = self._reference.run(at, runs[-1].present, _choices(actual))
            steps.append(self._measure(actual, run, at))
            _teach(cache, 0, run.trace, (at.start, at.stop))
            runs = [*runs[:2], run]  # each holds a whole cache
            logits.append(run.trace.logits[-1])
            advance()
        tokens.append(int(logits[-1].argmax()))
        measures["decode"] = worst(steps)
        checks = [check for phase, each in measures.items() for check in self._judge(each, case=name, phase=phase)]
        checks += judge_ties(list(measures.values()), self._bounds, case=name)
        return CaseRun(checks, measures, inputs, prefill, runs[1], tokens, logits)

    def batch(self, name: str, runs: Sequence[CaseRun]) -> list[Check]:
        """Several prompts as one right-padded batch against each alone: prefill, and one step at different lengths."""
        lengths = [len(run.inputs.embeds) for run in runs]
        shape = (len(runs), max(lengths))
        embeds = np.full((*shape, self._bundle.model.hidden_size), _PADDING, np.float32)
        modality = np.ones(shape, np.int32)
        for row, run in enumerate(runs):
            embeds[row, : lengths[row]] = run.inputs.embeds
            modality[row, : lengths[row]] = run.inputs.is_vision
        cache = self._cache([run.inputs for run in runs])
        trace = self._graphs.prefill(embeds, modality, np.array(lengths)[:, None] - 1, cache)
        checks, alone = [], []
        for row, run in enumerate(runs):
            actual = trace.row(row, lengths[row])
            last = replace(run.inputs, kept=np.array([lengths[row] - 1]))
            alone.append(self._alone(run.prefill, last, actual))
            place: dict[str, Any] = {"case": f"{name}, row {row}", "phase": "prefill"}
            checks += self._judge(self._measure(actual, alone[row], last), **place)
            _teach(cache, row, alone[row].trace, (0, lengths[row]))
        cache.lengths[:] = lengths
        step = np.stack([self._reference.embed(np.array(run.tokens[:1])) for run in runs])
        trace = self._graphs.decode(step, cache)
        for row, run in enumerate(runs):
            actual = trace.row(row, 1)
            at = Inputs(step[row], None, lengths[row], np.zeros(1, np.int64), run.inputs.adapters)
            expected, guide = run.first_step, _choices(actual)
            if alone[row].present is not run.prefill.present or not expected.serves(guide):
                expected = self._reference.run(at, alone[row].present, guide)
            place = {"case": f"{name}, row {row}", "phase": "decode"}
            checks += self._judge(self._measure(actual, expected, at), **place)
        return checks

    def full_cache(self, name: str, window: int | None) -> list[Check]:
        """A chunk and a step at the very end of the context, on a made-up cache: capacity and the window's edge.

        The slots around the oldest key that is still seen hold large values, so that one key more or less shows,
        however long the window is.
        """
        random = np.random.default_rng(7)
        capacity = self._bundle.kv_cache.capacity
        start = capacity - CHUNK - 1
        past = self._reference.model.new_cache(1, capacity)
        edge = 0 if window is None else max(0, start - window - 1)
        for key, value in past:
            for buffer in (key, value):
                made = random.standard_normal((buffer.shape[1], start, buffer.shape[3]), np.float32)
                buffer[0, :, :start] = torch.from_numpy(made)
            value[0, :, edge : edge + CHUNK + 4] *= 100
        ids = random.integers(0, self._bundle.model.vocab_size, CHUNK + 1)
        embeds = self._reference.embed(ids)
        modality = np.arange(CHUNK, dtype=np.int32) % 2
        inputs = Inputs(embeds[:-1], modality, start, np.arange(CHUNK), self._some_adapters())
        cache = self._cache([inputs])
        for layer, buffers in enumerate(past):
            for kind, buffer in zip(("key", "value"), buffers, strict=True):
                cache.put(f"{layer}.{kind}", 0, 0, buffer[0, :, :start].numpy())
        cache.lengths[:] = start
        actual = self._graphs.prefill(inputs.embeds[None], modality[None], inputs.kept[None], cache).row(0, CHUNK)
        run = self._reference.run(inputs, past, _choices(actual))
        chunk = self._measure(actual, run, inputs)
        _teach(cache, 0, run.trace, (inputs.start, inputs.stop))
        cache.lengths[:] = inputs.stop
        actual = self._graphs.decode(embeds[None, -1:], cache).row(0, 1)
        at = Inputs(embeds[-1:], None, inputs.stop, np.zeros(1, np.int64), inputs.adapters)
        step = self._measure(actual, self._reference.run(at, run.present, _choices(actual)), at)
        checks = self._judge(chunk, case=name, phase="prefill") + self._judge(step, case=name, phase="decode")
        return checks + judge_ties([chunk, step], self._bounds, case=name)

    def _cache(self, rows: Sequence[Inputs]) -> KVCache:
        """An empty cache with the adapters that these rows use, as the runtime's own code takes them from the file."""
        cache = self._graphs.new_cache(len(rows))
        chosen = [row.adapters for row in rows if row.adapters is not None]
        if self._adapters is not None and len(chosen) == len(rows):
            cache.constants = self._adapters.inputs(chosen)
        return cache

    def _some_adapters(self) -> Array | None:
        """Another adapter in each layer than in the one before."""
        banks = self._bundle.adapters
        return None if banks is None else np.arange(len(banks.layers), dtype=np.int32) % banks.num_experts

    def _alone(self, alone: ReferenceRun, inputs: Inputs, actual: Trace) -> ReferenceRun:
        """The reference of a row alone; run again only where the batch settled a tie otherwise."""
        guide = _choices(actual)
        if alone.serves(guide):
            return replace(alone, trace=replace(alone.trace, logits=alone.trace.logits[-1:]))
        past = self._reference.model.new_cache(1, inputs.stop + self._steps)
        return self._reference.run(inputs, past, guide)

    def _measure(self, actual: Trace, run: ReferenceRun, inputs: Inputs) -> Measure:
        return measure(actual, run, inputs, self._experts)

    def _judge(self, measured: Measure, **place: Any) -> list[Check]:
        return judge_measure(measured, self._bounds, **place)


def spread(length: int) -> Array:
    """At most `KEPT` positions, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, KEPT)).astype(np.int64))


def _choices(actual: Trace) -> Mapping[int, Array]:
    return {layer: routed.expert_ids for layer, routed in actual.routing.items()}


def _teach(cache: KVCache, row: int, trace: Trace, slots: tuple[int, int]) -> None:
    """Put the reference's keys and values into the bundle's buffers, so that what follows is judged on its own."""
    start, stop = slots
    for kind, buffers in (("key", trace.keys), ("value", trace.values)):
        for layer, buffer in enumerate(buffers):
            cache.put(f"{layer}.{kind}", row, start, buffer[:, start:stop])
