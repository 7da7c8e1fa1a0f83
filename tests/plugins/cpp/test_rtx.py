"""TensorRT for RTX takes the library: every op parses and builds for SM86, 89 and 120 on a machine without a GPU.

Experts in fp8 build for SM89 and 120 only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.engine_process import run_job
from moiie_export.builders.engine_specs import Profile
from moiie_runtime.errors import MoiieError
from tests.plugins.cpp.nodes import EXAMPLES
from tests.plugins.cpp.rtx_build import graph
from tests.plugins.cpp.shell import ROOT, released

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None and os.environ.get("CI") != "true",
    reason="TensorRT for RTX is not installed: pip install 'moiie-export[tensorrt-rtx]'",
)


@pytest.fixture(scope="module")
def builds() -> list[dict[str, Any]]:
    """What became of each graph of rtx_build.py."""
    command = [sys.executable, "-m", "tests.plugins.cpp.rtx_build", str(released().library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_op_builds(builds: list[dict[str, Any]]) -> None:
    right = [each for each in builds if not each["wrong"] and each["sms"] != [86]]
    assert len(right) == 8
    for each in right:
        assert each["bytes"], each
        assert each["op"]
        assert each["workspace"], "the engine says what it was built with"
        assert not each["refusals"]
        # A network that is one update in place has no text in its plan.
        assert each["layers"] or each["name"] == "cache", each


def test_the_library_is_stored_in_the_engine_when_asked(builds: list[dict[str, Any]]) -> None:
    *beside, stored = (each for each in builds if each["name"] == "decode" and not each["wrong"])
    assert not any(each["embedded"] for each in beside)
    assert stored["embedded"]
    assert stored["bytes"] > released().library.stat().st_size


def test_a_refusal_says_why(builds: list[dict[str, Any]]) -> None:
    (wrong,) = (each for each in builds if each["wrong"])
    assert wrong["bytes"] is None
    assert any("axis 2 ('I') must be 48, not 49" in each for each in wrong["refusals"])


def test_experts_in_fp8_are_inputs_of_that_type_and_nothing_for_an_older_gpu(builds: list[dict[str, Any]]) -> None:
    newer, older = (each for each in builds if each["name"] == "decode, fp8")
    assert newer["bytes"]
    assert older["bytes"] is None
    assert any("HW-specific datatypes: fp8_e4m3" in each for each in older["said"])


def test_a_build_fails_with_the_plugins_own_sentence(tmp_path: Path) -> None:
    """What TensorRT says of it is that a plugin returned an error."""
    path = tmp_path / "wrong.onnx"
    onnx.save(graph(EXAMPLES["decode"](), wrong=True), path)
    profile = Profile("one", {"T": (1, 1, 1)})
    job = EngineJob("wrong", path, tmp_path / "wrong.engine", (profile,), (89,), released().library)
    with pytest.raises(MoiieError, match=r"ExpertDispatch: .*axis 2 \('I'\) must be 48, not 49.*TensorRT: ") as caught:
        run_job("tensorrt_rtx", job, lambda *_: None)
    assert "node" in caught.value.message
    assert not job.output.exists()
