"""Beam search, for bundles whose generation settings ask for it: the runtime's answer against the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np

from moiie_export.parity.cases import Question
from moiie_export.parity.decoder_stage import CaseRun
from moiie_export.parity.reference import Inputs, Reference
from moiie_export.parity.report import Check, left_out
from moiie_export.parity.text import first_difference
from moiie_runtime.beam_search import BeamSearch
from moiie_runtime.errors import MoiieError
from moiie_runtime.generation_config import GenerationConfig
from moiie_runtime.kv_cache import static_rows
from moiie_runtime.prompt import Prompt, penalty_ids
from moiie_runtime.sampling import History
from moiie_runtime.vlm import VLM


def compare_beams(vlm: VLM, reference: Reference, question: Question, prompt: Prompt, run: CaseRun) -> list[Check]:
    """The tokens of the best beam, with the bundle's own number of beams and penalties; nothing where it uses none.

    The search is the runtime's on both sides, over logits of the bundle's graphs and of the PyTorch model.
    """
    length = len(run.tokens)
    config = vlm.settings(max_new_tokens=length, do_sample=False)
    if config.num_beams == 1:
        return []
    rows = static_rows(vlm.bundle)
    if rows is not None and rows < config.num_beams:
        reason = f"the bundle asks for {config.num_beams} beams, the engine has rows for {rows} (batch of its target)"
        return [left_out("beams", reason, case=question.name)]
    used = penalty_ids(prompt, vlm.bundle.penalty_prompt, vlm.bundle.tokens)
    expected = _reference_answer(reference, run, config, used)
    try:
        found = vlm.generate(question.messages, max_new_tokens=length, do_sample=False).token_ids
    except MoiieError as error:  # the prompt is sound and fits; what is wrong then is the bundle
        return [Check("beams", "equal tokens", 0, len(expected), False, case=question.name, note=error.message)]
    diverges, where = first_difference(expected, found), f"{config.num_beams} beams"
    place: dict[str, Any] = {"where": where, "case": question.name}
    if diverges is None:
        return [Check("beams", "equal tokens", len(expected), len(expected), True, **place)]
    decode = vlm.processor.tokenizer.decode
    note = f"token {diverges}: {decode(found)!r} instead of {decode(expected)!r}"
    return [Check("beams", "equal tokens", diverges, len(expected), False, **place, note=note)]


def _reference_answer(
    reference: Reference, run: CaseRun, config: GenerationConfig, history: History
) -> tuple[int, ...]:
    search = BeamSearch(config, history)
    step = search.advance(run.token_logits[0][None])
    start, beams = len(run.inputs.embeds), [run.prefill] * config.num_beams
    while not search.done:
        embeds = reference.embed(step.tokens)
        inputs = [Inputs(row[None], None, start, np.zeros(1, np.int64), run.inputs.adapters) for row in embeds]
        beams = [
            reference.run(each, beams[source].present, {}) for each, source in zip(inputs, step.sources, strict=True)
        ]
        step = search.advance(np.stack([beam.trace.logits[-1] for beam in beams]))
        start += 1
    return search.best()
