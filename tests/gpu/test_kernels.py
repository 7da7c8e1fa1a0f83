"""On a GPU: the kernels against float64. Without one: the script that measures them, at toy sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export.builders import BuildResult
from moiie_runtime.errors import MissingDependency, MoiieError
from tests.plugins.interpreter import needs_triton

ROOT = Path(__file__).parents[2]


def _run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **settings}
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


class Answering:
    """A VLM that gives one answer."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate_prompt(self, *_: object, **__: object) -> Any:
        return SimpleNamespace(token_ids=self.tokens)


@pytest.mark.parametrize(
    ("engine", "outcome"),
    [
        ([1, 2], "ok: 2 of 2 are those of ONNX Runtime on the CPU"),
        ([1, 3], "FAIL: 0 of 2 are those of ONNX Runtime on the CPU"),
        (MissingDependency("there is no driver"), "not run: there is no driver"),
        (MoiieError("a wrong shape"), "FAIL: a wrong shape"),
        (ImportError("no cuda"), "not run: no cuda"),
    ],
)
def test_the_pipeline_compares_tokens_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, outcome: str
) -> None:
    from tests.gpu import pipeline

    asked: list[Any] = []

    def build(request: Any, _: object) -> BuildResult:
        asked.append(request)
        return BuildResult(request.output, False, 1.0, {"a": {}})

    def load(_: Path, target: str) -> Answering:
        if target == "portable":
            return Answering([1, 2])
        if isinstance(engine, Exception):
            raise engine
        return Answering(engine)

    monkeypatch.setattr(pipeline, "BACKENDS", {"tensorrt": "server"})
    monkeypatch.setattr(pipeline, "_importable", lambda _: True)
    monkeypatch.setattr("moiie_export.builders.build", build)
    monkeypatch.setattr("moiie_runtime.load", load)
    (tmp_path / "bundle").mkdir()
    steps = list(pipeline.pipeline_steps(pipeline.Given(90, tmp_path / "bundle")))
    assert steps[0].outcome.startswith("ok: 1 files in 1.0 s, dense experts")
    assert steps[1].outcome == outcome
    assert steps[1].failed == outcome.startswith("FAIL")
    assert steps[1].ran == (not outcome.startswith("not run"))
    assert len(steps) == (2 if isinstance(engine, Exception) else 3), "parity follows where there is an engine"
    assert (asked[0].target.sms, asked[0].target.plugins) == ((90,), "off")
    (tmp_path / "bundle" / "engines" / "server").mkdir(parents=True)
    again = list(pipeline.pipeline_steps(pipeline.Given(90, tmp_path / "bundle")))
    assert [step.outcome for step in again] == [step.outcome for step in steps[1:]], "engines that travelled are used"
    assert len(asked) == 1


def test_without_a_gpu_it_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = _run()
    assert done.returncode == 4
    assert "--interpret" in done.stderr


def test_wheels_may_come_in_parts(tmp_path: Path) -> None:
    """As `split` makes them; they are unpacked once, all or nothing."""
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("library_in_parts/__init__.py", "x = 1\n" * 100)
    data = (tmp_path / "a.whl").read_bytes()
    (tmp_path / "a.whl").unlink()
    missing = _run("--help", WHEEL_PARTS=str(tmp_path))
    assert missing.returncode == 4
    assert "no wheels (NAME.whl) and no parts of one" in missing.stderr
    (tmp_path / "a.whl.aa").write_bytes(data[:100])
    damaged = _run("--help", WHEEL_PARTS=str(tmp_path))
    assert damaged.returncode == 4
    assert "a.whl: is damaged, or parts are missing" in damaged.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["a.whl.aa"], "nothing half-made stays"
    (tmp_path / "a.whl.ab").write_bytes(data[100:])
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        wheel.writestr("library_in_one_piece.py", "x = 2")
    for _ in range(2):
        assert _run("--help", WHEEL_PARTS=str(tmp_path)).returncode == 0
        unpacked = tmp_path / "unpacked"
        assert (unpacked / "library_in_parts" / "__init__.py").read_text().startswith("x = 1")
        assert {each.name for each in unpacked.iterdir()} == {"library_in_parts", "library_in_one_piece.py"}
