"""On a GPU: the kernels against float64. Without one: the script that measures them, at toy sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.interpreter import needs_triton

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    script = ROOT / "tests" / "gpu" / "run.sh"
    return subprocess.run(
        ["bash", str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.gpu
@needs_triton
def test_numerics_on_the_gpu() -> None:
    done = _run("--only", "numerics")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_the_script_measures_and_prints_its_table_last(tmp_path: Path) -> None:
    done = _run("--interpret", "--only", "speed", "--formats", "float16", "--json", str(tmp_path / "results.jsonl"))
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("what   ")[1]
    assert "decode toy float16" in table
    assert "prefill toy float16: PyTorch grouped" in table
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_without_a_gpu_it_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = _run()
    assert done.returncode == 4
    assert "--interpret" in done.stderr
