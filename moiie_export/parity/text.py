"""The whole product at once: the runtime's own answer against the reference's greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moiie_export.parity.cases import Question
from moiie_export.parity.decoder_stage import CaseRun
from moiie_export.parity.metrics import Array, error
from moiie_export.parity.report import Check, judge, left_out
from moiie_export.recipe_parity import Bounds
from moiie_runtime.errors import MoiieError
from moiie_runtime.generate import Generation, Record
from moiie_runtime.vlm import VLM


@dataclass(frozen=True)
class Answers:
    """Ids and texts of both sides.

    Attributes:
        shared_text: the text up to where they part; all of it when they do not.
        reference_token, bundle_token: there, the token of each side as text; None where a side ended or none differs.
        diverges: index of the first token that differs; None when none does.
        gap: there, how much the reference prefers its own token to the bundle's.
        near: the gap is within what the logits may differ by.
    """

    reference_ids: list[int]
    bundle_ids: list[int]
    reference_text: str
    bundle_text: str
    shared_text: str
    reference_token: str | None
    bundle_token: str | None
    diverges: int | None
    gap: float | None
    near: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return vars(self)


def compare_text(
    vlm: VLM, question: Question, run: CaseRun, eos: Sequence[int], bounds: Bounds
) -> tuple[list[Check], Answers]:
    """Let the runtime answer and compare tokens and the logits they were chosen from.

    The runtime is not told anything: prompt, pixels, embeddings, cache and unmarked graphs are its own.

    Returns:
        The checks and the answers.
    """
    expected = _until_end(run.tokens, eos)
    try:
        generation = vlm.generate(
            question.messages,
            record=Record(step_logits=True),
            max_new_tokens=len(run.tokens),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
        )
    except MoiieError as error:  # the prompt is sound and fits; what is wrong then is the bundle
        nothing = _answers(vlm, [], expected, run.token_logits, bounds)
        return [Check("text", "equal tokens", 0, len(expected), False, case=question.name, note=error.message)], nothing
    answers = _answers(vlm, list(generation.token_ids), expected, run.token_logits, bounds)
    same = len(expected) if answers.diverges is None else answers.diverges
    note = ""
    if answers.diverges is not None:
        note = f"token {same}: {answers.bundle_text!r} instead of {answers.reference_text!r}"
        note += f"; a near tie, gap {answers.gap:.2g}" if answers.near else ""
    passed = answers.diverges is None or answers.near
    tokens = Check("text", "equal tokens", same, len(expected), passed, case=question.name, note=note)
    return [_logits(generation, run, same, bounds, question.name), tokens], answers


def _logits(generation: Generation, run: CaseRun, same: int, bounds: Bounds, case: str) -> Check:
    """The logits of all steps up to the first other token; what follows has another past."""
    if sum(measured.ties for measured in run.measures.values()):
        return left_out("answer logits", "a routing tie in this case changes them", case=case)
    logits = generation.step_logits
    steps = min(same + 1, 0 if logits is None else len(logits), len(run.token_logits))
    if logits is None or not steps:
        return judge("answer logits", "error", float("nan"), bounds.logits_error, case=case, note="no logits")
    found = error(logits[:steps], np.stack(run.token_logits[:steps]))
    note = "" if found.value == 0 else f"worst at token {found.row}"
    return judge("answer logits", "error", found.value, bounds.logits_error, case=case, note=note)


def _answers(vlm: VLM, found: list[int], expected: list[int], logits: Sequence[Array], bounds: Bounds) -> Answers:
    diverges = first_difference(expected, found)
    gap, near = None, False
    if diverges is not None and diverges < min(len(expected), len(found)):
        row = logits[diverges]
        gap = float(row[expected[diverges]] - row[found[diverges]])
        near = bool(gap <= 2 * bounds.logits_error * max(1.0, float(np.abs(row).max())))
    decode = vlm.processor.tokenizer.decode
    tokens = [None if diverges is None else next(iter(ids[diverges:]), None) for ids in (expected, found)]
    reference_token, bundle_token = (None if token is None else decode([token]) for token in tokens)
    return Answers(
        expected,
        found,
        decode(expected),
        decode(found),
        decode(expected[:diverges]),
        reference_token,
        bundle_token,
        diverges,
        gap,
        near,
    )


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first token that differs, an end where the other goes on included; None when all are equal."""
    pairs = zip([*expected, None], [*found, None], strict=False)
    return next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)


def _until_end(tokens: Sequence[int], eos: Sequence[int]) -> list[int]:
    """The tokens up to the first end token, it included: where the runtime stops."""
    end = next((index for index, token in enumerate(tokens) if token in eos), len(tokens))
    return list(tokens[: end + 1])
