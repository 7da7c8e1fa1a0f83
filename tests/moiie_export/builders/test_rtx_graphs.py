"""Phi-3 and LLaMA-3 at their real widths, and all graphs of MoME, parse and build for three GPUs together, without a GPU.

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
from tests.hollow import INT8_ATTENTION, RULES, write_graphs
from tests.plugins.cpp.shell import released
from tests.rtx import need_rtx

SMS = [86, 89, 120]
DECODER = ("decoder_decode", "decoder_prefill")
FULL_WIDTH = {"llama3": DECODER, "phi3": (*DECODER, "vision_encoder")}
"""LLaMA-3's vision encoder is Phi-3's but for the projector's last width."""
MOME = ("decoder_decode", "decoder_prefill", "router", "vision_clip", "vision_dino", "vision_pix2struct")
Builds = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """(folder, graph) -> what was built; one process for all."""
    need_rtx()
    folder = tmp_path_factory.mktemp("graphs")
    for name, graphs in FULL_WIDTH.items():
        write_graphs(folder / name, name, graphs, 4096, INT8_ATTENTION if name == "phi3" else RULES)
    (folder / "mome").symlink_to(exported_mome(640).bundle)
    (folder / "out").mkdir()
    folders = [folder / name for name in (*FULL_WIDTH, "mome")]
    script = Path(__file__).parent / "rtx_process.py"
    command = [sys.executable, script, folder / "out", released().library, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(each["folder"], each["graph"]): each for each in lines}


def test_every_graph_is_built_for_all_gpus_together(builds: Builds) -> None:
    graphs = {(folder, name) for folder, names in {**FULL_WIDTH, "mome": MOME}.items() for name in names}
    assert set(builds) == graphs | {("phi3", "dense")}
    for each in builds.values():
        assert each["sms"] == SMS
        assert each["accelerators"] == [SMS]


def test_profiles_and_masks_are_in_the_plan(builds: Builds) -> None:
    """Phi-3 attends to 2047 keys, fewer than the 4096 there is room for; the others see all."""
    longest = {"llama3": 1024, "phi3": 1024, "mome": 640}
    for (folder, graph), each in builds.items():
        if graph == "decoder_prefill":
            assert each["bounds"] == [[1, 64], [65, longest[folder]]]
            assert (each["causal"] >= 1) == (folder != "phi3")
        if graph == "decoder_decode":
            assert each["bounds"] == []
        if graph in DECODER:
            assert each["attention"] == ("mask" if folder == "phi3" else "lower_right")
    assert builds["phi3", "vision_encoder"]["bounds"] == [[1, 4]]


@pytest.mark.parametrize(("model", "hidden", "intermediate"), [("llama3", 4096, 14336), ("phi3", 3072, 8192)])
def test_quantised_experts_of_real_width_are_inputs_of_the_plugin(
    builds: Builds, model: str, hidden: int, intermediate: int
) -> None:
    """Two banks in each of two layers; the decode step has one, without the expert that only vision reaches."""
    prefill, decode = (builds[model, graph] for graph in ("decoder_prefill", "decoder_decode"))
    assert prefill["banks"]["experts.1.vision.gate_up"] == [1, 2 * intermediate, hidden // 2]
    assert prefill["banks"]["experts.1.language.down_scales"] == [3, hidden, intermediate // 32]
    assert decode["banks"] == {name: shape for name, shape in prefill["banks"].items() if ".language." in name}
    for each, banks in ((prefill, 4), (decode, 2)):
        assert each["layers"] >= banks
        experts = sum(shape[0] * shape[1] * shape[2] for shape in each["banks"].values())
        assert each["bytes"] < experts / 4, "experts are not in the plan"


def test_without_plugins_the_experts_of_one_layer_are_multiplied_out_at_a_time(builds: Builds) -> None:
    """From the same inputs; TensorRT would do so for both layers before the first, if nothing kept it from that."""
    dense, plugin = builds["phi3", "dense"], builds["phi3", "decoder_decode"]
    assert dense["banks"] == plugin["banks"]
    assert dense["layers"] == 0
    layer = 2 * 3 * 3 * 3072 * 8192
    assert layer < dense["work"] < 1.3 * layer


def test_attention_in_int8_is_multiplied_out_a_layer_at_a_time(builds: Builds) -> None:
    """Left alone, TensorRT for RTX holds float16 copies of all layers' at once: two of them here, 32 in the whole model."""
    layer = 2 * 4 * 3072 * 3072
    assert layer / 2 < builds["phi3", "decoder_decode"]["work"] < 1.3 * layer
