"""LLaMA-3's decoder at its real widths, and all graphs of MoME, parse and build for three GPUs together, without a GPU.

Weights are holes in files, stored in four bits, and experts are inputs: a real width costs seconds and little memory. That
nothing is dropped from a graph on the way ("Unused Input") is checked by every build.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.exports import exported_mome
from tests.hollow import write_decoder
from tests.plugins.cpp.shell import released
from tests.rtx import need_rtx

SMS = [86, 89, 120]
MOME = ("decoder_decode", "decoder_prefill", "router", "vision_clip", "vision_dino", "vision_pix2struct")
Builds = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """(folder, graph) -> what was built; one process for all."""
    need_rtx()
    folder = tmp_path_factory.mktemp("graphs")
    write_decoder(folder / "llama3", "llama3", "decoder_prefill", 4096)
    mome = exported_mome(640).bundle
    (folder / "mome").symlink_to(mome)
    (folder / "out").mkdir()
    folders = [folder / name for name in ("llama3", "mome")]
    script = Path(__file__).parent / "rtx_process.py"
    command = [sys.executable, script, folder / "out", released().library, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(each["folder"], each["graph"]): each for each in lines}


def test_every_graph_is_built_for_all_gpus_together(builds: Builds) -> None:
    assert set(builds) == {
        ("llama3", "decoder_prefill"),
        *(("mome", name) for name in MOME),
    }
    for each in builds.values():
        assert each["sms"] == SMS
        assert each["accelerators"] == [SMS]


def test_profiles_and_masks_are_in_the_plan(builds: Builds) -> None:
    assert builds["llama3", "decoder_prefill"]["bounds"] == [[1, 64], [65, 1024]]
    assert builds["mome", "decoder_prefill"]["bounds"] == [[1, 64], [65, 640]]
    for (_, graph), each in builds.items():
        if graph == "decoder_prefill":
            assert each["attention"] == "lower_right"
            assert each["causal"] >= 1
        if graph == "decoder_decode":
            assert each["bounds"] == []


def test_quantised_experts_of_real_width_are_inputs_of_the_plugin(builds: Builds) -> None:
    prefill = builds["llama3", "decoder_prefill"]
    assert prefill["banks"]["experts.1.vision.gate_up"] == [1, 2 * 14336, 4096 // 2]
    assert prefill["banks"]["experts.1.language.down_scales"] == [3, 4096, 14336 // 32]
    assert prefill["layers"] >= 4, "two banks in each of two layers"
    experts = sum(shape[0] * shape[1] * shape[2] for shape in prefill["banks"].values())
    assert prefill["bytes"] < experts, "experts are not in the plan"
