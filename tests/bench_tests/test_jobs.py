from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.bench.jobs import descendants, forget_pages, run_job
from tests.bench.workers import EngineSpec, Worker, usable


def test_descendants_of_a_process():
    parent_of = {2: 1, 3: 2, 4: 2, 5: 4, 6: 1, 7: 9, 9: 7}
    assert descendants(2, parent_of) == {2, 3, 4, 5}
    assert descendants(7, parent_of) == {7, 9}


def test_a_job_counts_memory_of_its_children():
    inner = "import time; block = bytearray(60_000_000); time.sleep(0.6)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}]); print('made')"
    found = run_job([sys.executable, "-c", outer])
    assert found["stdout"] == "made\n"
    assert 60e6 < found["peak_anon"] < 150e6
    assert found["seconds"] >= 0.6


def test_a_job_that_fails_says_why():
    with pytest.raises(RuntimeError, match="exit status 3.*no such thing"):
        run_job([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def test_forgotten_files_are_whole(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * 100_000)
    forget_pages([path])
    assert path.read_bytes() == b"x" * 100_000


def test_an_engine_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.bench.workers.os.cpu_count", lambda: 2)
    spec = EngineSpec("bandwidth", "bandwidth", options={"threads": 1, "bytes": 40_000_000})
    assert spec.missing() is None
    with Worker(spec, tmp_path) as worker:
        sample = worker.sample({"prompt_tokens": 1, "new_tokens": 1})
        assert worker.about["numpy"] == np.__version__
        assert state_of(worker.pid) == "T"  # stopped: it cannot take a core from the next one
        assert sample["bytes_per_second"] > 1e8
        assert 0 <= sample["foreign"] <= 1
        assert worker.ask({"do": "memory"})["anon"] > 4e7


def test_what_cannot_run_is_named(capsys):
    absent = EngineSpec("llama", "llama_cpp", options={"llama_bench": "/no/such/tool"})
    nowhere = EngineSpec("genai", "genai", python="/no/such/python")
    assert usable([absent, nowhere]) == []
    told = capsys.readouterr().err
    assert "skipped: llama: no llama-bench" in told
    assert "skipped: genai: " in told
    assert "/no/such/python" in told


def state_of(pid: int) -> str:
    import time
    from pathlib import Path

    for _ in range(100):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "T":
            break
        time.sleep(0.01)
    return state
