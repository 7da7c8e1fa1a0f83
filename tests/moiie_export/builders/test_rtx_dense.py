"""Engines without the plugin library: experts of every format bound or stored, in half precisions, for three GPUs together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moiie_export.builders import BuildRequest, plan
from moiie_export.builders.plan_file import accelerators, plan_text
from moiie_export.builders.tensorrt import build_engines
from tests.exports import FUSIBLE, MIXED_RULES, SMALLEST, exported
from tests.moiie_export.builders.test_rtx_eight_bits import eight_bits
from tests.rtx import need_rtx
from tests.trt_graphs import target

ALL, FLOAT8 = [86, 89, 120], [89, 120]
Builds = dict[str, dict[str, Any]]


def mixed() -> Path:
    """Two layers, of which one has experts: one in int8, that only vision reaches, and three in int4."""
    return exported({**FUSIBLE, "layers": 2}, "float32", 256, MIXED_RULES).bundle


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """What was built; one process for all."""
    need_rtx()
    jobs = [
        f"integers={mixed()},decoder_decode,86+89+120,inputs,float16",
        f"stored integers={mixed()},decoder_prefill,86+89+120,constants,bfloat16",
        f"floats={eight_bits().bundle},decoder_decode,89+120,inputs,bfloat16",
        f"stored floats={eight_bits().bundle},decoder_decode,89+120,constants,float16",
    ]
    script = Path(__file__).parent / "dense_process.py"
    command = [sys.executable, script, tmp_path_factory.mktemp("dense"), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {each["name"]: each for each in map(json.loads, done.stdout.splitlines())}


def test_every_format_is_built_for_all_gpus_together(builds: Builds) -> None:
    wanted = {"integers": ALL, "stored integers": ALL, "floats": FLOAT8, "stored floats": FLOAT8}
    assert {name: each["accelerators"] for name, each in builds.items()} == {
        name: [sms] for name, sms in wanted.items()
    }
    assert {each["layers"] for each in builds.values()} == {0}, "no plugin"


def test_bound_experts_are_inputs_as_they_are_stored(builds: Builds) -> None:
    names = ["down", "down_scales", "gate_up", "gate_up_scales"]
    for build, layer, kinds in (("integers", 1, ("int8", "half")), ("floats", 0, ("fp8_e4m3", "float"))):
        inputs = {f"experts.{layer}.language.{name}": kinds["scales" in name] for name in names}
        assert builds[build]["inputs"] == inputs


def test_stored_experts_keep_their_bits(builds: Builds) -> None:
    """Sizes in bytes of gate_up and down of three experts in int4, of one in int8, and of three in E4M3."""
    gate_up, down = 2 * 96 * 64, 96 * 64
    integers = {(3 * gate_up // 2, "int4"), (3 * down // 2, "int4"), (gate_up, "int8"), (down, "int8")}
    floats = {(3 * 2 * 48 * 32, "fp8_e4m3"), (3 * 48 * 32, "fp8_e4m3")}
    for name, wanted, largest in (("stored integers", integers, down), ("stored floats", floats, 48 * 32)):
        assert builds[name]["inputs"] == {}
        found = {(size, kind) for size, _, kind in builds[name]["stored"]}
        assert wanted <= found
        assert max(size for size, kind in found if kind in ("half", "bf16", "float")) < largest


def test_a_bundle_in_bfloat16_with_its_experts_in_the_engines(tmp_path: Path) -> None:
    need_rtx()
    copy = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path / "bundle"))
    wanted = target("rtx", precision="bfloat16", banks="constants", prefill=(64,))
    result = build_engines(BuildRequest(copy, wanted), lambda *_: None)
    document = json.loads((result.path / "engine.json").read_text(encoding="utf-8"))
    assert document["banks"] == []
    assert document["kv_cache"] == {"dtype": "bfloat16", "in_place": True}
    for name, component in document["components"].items():
        kinds = {each["dtype"] for each in component["inputs"]}
        assert "bfloat16" in kinds, name
        assert not {"float16", "float32"} & kinds
        text = plan_text((result.path / f"{name}.engine").read_bytes())
        assert accelerators(text) == {tuple(ALL)}
        assert "type=half" not in text
        experts = "dims={ 3 32 96 }" if name == "decoder_decode" else "dims={ 4 32 96 }"
        assert (experts in text) == name.startswith("decoder"), name


def test_a_dry_run_asks_for_no_plugin_library_either() -> None:
    for plugins in ("off", "optional"):
        said = plan(BuildRequest(mixed(), target("rtx", plugins=plugins)))
        assert not any("plugin" in note for note in said.notes)
