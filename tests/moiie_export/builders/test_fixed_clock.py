"""A program sees the fixed clock's time, not how long it takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moiie_export.builders.fixed_clock import fixed_clock
from moiie_runtime.native import compiling

READ = "import time; print(time.monotonic_ns()); time.sleep(0.01); print(time.monotonic_ns()); print(time.time_ns())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD is known on Linux")
def test_two_runs_read_the_same_times() -> None:
    environment = os.environ | fixed_clock()
    assert environment != os.environ
    command = [sys.executable, "-S", "-c", READ]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second
    start, end, _ = (int(line) for line in first.split())
    assert 0 < end - start < 10_000_000  # shorter than the program slept


def test_without_a_compiler_the_clock_is_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILERS", ())
    assert fixed_clock() == {}
