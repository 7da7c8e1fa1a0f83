from __future__ import annotations

import os

import pytest

from moiie_runtime import cores


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "", 4),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "", 2),
        ({0: "0-1", 1: "0-1"}, "", 1),
        ({0: "", 1: ""}, "", 2),
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "max 100000", 4),
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "250000 100000", 2),
        ({0: "0", 1: "1"}, "50000 100000", 1),
        ({0: "0", 1: "1"}, "nonsense", 2),
    ],
)
def test_physical_cores_within_affinity_and_quota(siblings, quota, expected, monkeypatch):
    def read(path):
        return quota if path.name == "cpu.max" else siblings[int(path.parts[-3].removeprefix("cpu"))]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings), raising=False)
    monkeypatch.setattr(cores, "_read", read)
    assert cores.available_cores() == expected


def test_this_machine():
    assert 1 <= cores.available_cores() <= os.cpu_count()
