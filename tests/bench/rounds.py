"""Interleaved samples of several engines, their medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tests.bench.quiet import is_quiet

Sample = dict[str, Any]


class Sampler(Protocol):
    """What can be measured; a `Worker` is one."""

    name: str

    def sample(self, request: Mapping[str, Any]) -> Sample: ...


@dataclass(frozen=True)
class Rounds:
    """How long to measure: until every engine has `wanted` quiet samples, or for `most` rounds."""

    wanted: int = 7
    most: int = 15


def interleave(samplers: Sequence[Sampler], request: Mapping[str, Any], rounds: Rounds) -> dict[str, list[Sample]]:
    """Samples by engine, after one warm-up each; a sample's `round` says which of them belong together.

    Each round begins with another engine, so that none always follows the same one.
    """
    for sampler in samplers:
        sampler.sample({**request, "seed": 0})
    taken: dict[str, list[Sample]] = {sampler.name: [] for sampler in samplers}
    for number in range(rounds.most):
        turn = number % len(samplers)
        for sampler in [*samplers[turn:], *samplers[:turn]]:
            sample = sampler.sample({**request, "seed": number + 1})
            taken[sampler.name].append({**sample, "round": number})
        if all(sum(map(is_quiet, samples)) >= rounds.wanted for samples in taken.values()):
            break
    return taken


def summarise(samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, Any]:
    """Median, smallest and largest of each metric over the quiet samples, and how many were kept.

    A metric without quiet samples is None: a figure of a busy machine is none.
    """
    kept = [sample for sample in samples if is_quiet(sample)]
    found: dict[str, Any] = {"kept": len(kept), "taken": len(samples)}
    for metric in metrics:
        values = [sample[metric] for sample in kept if metric in sample]
        found[metric] = statistics.median(values) if values else None
        found[f"{metric}_range"] = [min(values), max(values)] if values else None
    return found


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], metric: str) -> dict[str, float | int | None]:
    """How many times theirs ours is: by medians, and the median over rounds in which both samples are quiet."""
    first = {sample["round"]: sample[metric] for sample in ours if is_quiet(sample)}
    second = {sample["round"]: sample[metric] for sample in theirs if is_quiet(sample)}
    both = sorted(first.keys() & second.keys())
    if not first or not second:
        return {"of_medians": None, "paired": None, "pairs": 0}
    return {
        "of_medians": statistics.median(first.values()) / statistics.median(second.values()),
        "paired": statistics.median(first[number] / second[number] for number in both) if both else None,
        "pairs": len(both),
    }


def with_rates(samples: Mapping[str, Sequence[Sample]], prompt: int, new: int) -> dict[str, list[Sample]]:
    """The samples with tokens a second beside the seconds."""
    return {
        name: [
            {
                **sample,
                **{
                    f"{phase}_rate": tokens / sample[f"{phase}_seconds"]
                    for phase, tokens in (("prefill", prompt), ("decode", new))
                    if f"{phase}_seconds" in sample
                },
            }
            for sample in each
        ]
        for name, each in samples.items()
    }
