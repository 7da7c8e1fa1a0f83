from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.bench.rounds import Rounds, interleave, ratio, summarise, with_rates


class Fake:
    """An engine whose samples are given; notes the order of calls."""

    def __init__(self, name: str, foreign: Iterator[float], log: list[str]) -> None:
        self.name, self._foreign, self._log = name, foreign, log

    def sample(self, request: Any) -> dict[str, Any]:
        self._log.append(self.name)
        return {"seconds": float(request["seed"]), "foreign": next(self._foreign)}


def fakes(first: list[float], second: list[float]) -> tuple[list[Fake], list[str]]:
    log: list[str] = []
    return [Fake("a", iter([0.0, *first]), log), Fake("b", iter([0.0, *second]), log)], log


def test_samples_alternate_and_each_engine_begins_in_turn():
    engines, log = fakes([0.0] * 3, [0.0] * 3)
    taken = interleave(engines, {}, Rounds(wanted=3, most=9))
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]  # two warm-ups, three rounds
    assert [sample["round"] for sample in taken["a"]] == [0, 1, 2]
    assert [sample["seconds"] for sample in taken["b"]] == [1.0, 2.0, 3.0]  # the same request in a round


def test_rounds_go_on_until_every_engine_has_quiet_samples():
    engines, _ = fakes([0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0])
    taken = interleave(engines, {}, Rounds(wanted=3, most=9))
    assert len(taken["a"]) == len(taken["b"]) == 5


def test_rounds_end_on_a_busy_machine():
    engines, _ = fakes([0.5] * 4, [0.5] * 4)
    taken = interleave(engines, {}, Rounds(wanted=3, most=4))
    assert len(taken["a"]) == 4
    assert summarise(taken["a"], ["seconds"]) == {"kept": 0, "taken": 4, "seconds": None, "seconds_range": None}


def test_only_quiet_samples_count():
    samples = [
        {"rate": rate, "foreign": foreign} for rate, foreign in ((1.0, 0.0), (9.0, 0.2), (3.0, 0.06), (2.0, 0.0))
    ]
    found = summarise(samples, ["rate"])
    assert found == {"kept": 3, "taken": 4, "rate": 2.0, "rate_range": [1.0, 3.0]}


def test_ratios_pair_samples_of_one_round():
    ours = [{"round": number, "rate": rate, "foreign": 0.0} for number, rate in enumerate((2.0, 4.0, 8.0))]
    theirs = [{"round": number, "rate": rate, "foreign": 0.0} for number, rate in enumerate((1.0, 2.0, 4.0))]
    theirs[2]["foreign"] = 0.5
    found = ratio(ours, theirs, "rate")
    assert found == {"of_medians": pytest.approx(4.0 / 1.5), "paired": 2.0, "pairs": 2}


def test_a_ratio_needs_quiet_samples_of_both():
    quiet, busy = [{"round": 0, "rate": 1.0, "foreign": 0.0}], [{"round": 0, "rate": 1.0, "foreign": 1.0}]
    assert ratio(quiet, busy, "rate") == {"of_medians": None, "paired": None, "pairs": 0}


def test_rates_are_tokens_by_seconds():
    samples = {"a": [{"prefill_seconds": 2.0, "decode_seconds": 4.0, "foreign": 0.0}]}
    [sample] = with_rates(samples, 256, 64)["a"]
    assert (sample["prefill_rate"], sample["decode_rate"]) == (128.0, 16.0)
