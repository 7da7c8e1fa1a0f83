from __future__ import annotations

import os

import pytest

from tests.bench.quiet import FOREIGN_LIMIT, Usage, busy_seconds, foreign_share, is_quiet, process_seconds, usage

TICKS = os.sysconf("SC_CLK_TCK")


def test_foreign_share_is_what_others_used_of_all_cpus():
    before, after = Usage(10.0, 100.0, 5.0), Usage(12.0, 103.0, 8.5 - 1.0)
    assert foreign_share(before, after, 2) == pytest.approx((3.0 - 2.5) / 4.0)
    assert foreign_share(before, after, 4) == pytest.approx(0.5 / 8.0)


def test_foreign_share_stays_between_0_and_1():
    start = Usage(0.0, 0.0, 0.0)
    assert foreign_share(start, Usage(1.0, 1.0, 1.02), 2) == 0.0  # clocks tick at different moments
    assert foreign_share(start, Usage(1.0, 9.0, 0.0), 2) == 1.0


def test_no_time_between_two_readings_is_an_error():
    with pytest.raises(ValueError, match="need time between"):
        foreign_share(Usage(1.0, 1.0, 1.0), Usage(1.0, 2.0, 1.0), 2)


def test_the_limit_itself_is_quiet():
    assert is_quiet({"foreign": FOREIGN_LIMIT})
    assert not is_quiet({"foreign": FOREIGN_LIMIT + 1e-9})


def test_busy_time_leaves_out_idle_and_counts_stolen_time():
    stat = "cpu  10 20 30 4000 500 6 7 80 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert busy_seconds(stat) == pytest.approx((10 + 20 + 30 + 6 + 7 + 80) / TICKS)


def test_a_process_with_spaces_and_parentheses_in_its_name():
    fields = ["S", *["0"] * 10, "100", "20", "3", "4", *["0"] * 30]
    assert process_seconds("42 (a) b (c) " + " ".join(fields)) == pytest.approx(127 / TICKS)


def test_work_of_this_process_is_its_own():
    before = usage(os.getpid())
    total = sum(i * i for i in range(1_500_000))
    after = usage(os.getpid())
    assert total
    assert after.own - before.own > 0
    assert after.busy - before.busy >= after.own - before.own - 4 / TICKS
