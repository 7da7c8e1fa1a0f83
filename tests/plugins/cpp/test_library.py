"""What TensorRT asks of a plugin library: creators, negotiation, shapes, workspace, and lives without memory errors."""

from __future__ import annotations

import subprocess

import pytest
import torch

from tests.plugins.cpp.nodes import EXAMPLES
from tests.plugins.cpp.shell import TYPES, drive, tools

CREATORS = [
    "ExpertDispatch|1||experts",
    "QuantizedExpertDispatch|1||experts|bits|group_size",
    "Fp8ExpertDispatch|1||experts",
    "KVCacheUpdate|1|",
    "DecodeAttention|1||window|scale",
    "DeformableSample|1|",
]


def test_creators() -> None:
    assert drive([], driver=False).all("creator") == [f"PLUGIN CREATOR_V3ONE|{each}" for each in CREATORS]


def test_only_what_tensorrt_looks_up_is_exported_and_nothing_of_nvidia_is_linked() -> None:
    library = str(tools().sanitized)
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines() if " T " in line]
    assert {"getCreators", "setLoggerFinder", "moiieTakeErrors"} == set(names)
    linked = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in linked
    assert not any(name in linked for name in ("cuda", "cudart", "nvinfer", "tensorrt"))


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_cycles_of_a_plugins_life(kind: str) -> None:
    """Create, clone, serialise, create from that, attach, destroy: the address sanitizer looks on."""
    lines = []
    for make in EXAMPLES.values():
        node = make().node()
        node.kind = kind  # parsers differ in how they pass whole numbers
        lines += [*node.lines(), *[f"cycles {node.op} 20"] * 2]
    said = drive(lines, driver=False)
    assert not said.all("failed")
    assert not said.all("log")


def test_cycles_that_end_in_a_refusal() -> None:
    lines = ["clear", "field experts int64 2 7 7", *["cycles ExpertDispatch 1"] * 20]
    said = drive(lines, driver=False)
    assert said.all("failed") == ["cycles ExpertDispatch 1"] * 20
    assert len(said.all("log")) == 20


def _types(name: str) -> list[set[int]]:
    node = EXAMPLES[name]().node()
    lines = drive([*node.lines(), f"formats {node.op}"], driver=False).all("types")
    assert not any("vectorised" in line for line in lines), "only linear tensors"
    return [set(map(int, line.split()[1:])) for line in lines]


def test_formats() -> None:
    half, brain, single = TYPES[torch.float16], TYPES[torch.bfloat16], TYPES[torch.float32]
    whole, byte = TYPES[torch.int32], TYPES[torch.int8]
    assert _types("decode") == [{half, brain}, {whole}, {single}, {half}, {half}, {half}]
    assert _types("decode, int4 of 32") == [{half, brain}, {whole}, {single}, {byte}, {byte}, {half}, {half}, {half}]
    assert _types("cache") == [{half}, {half}, {whole}, {half}]
    assert _types("samples, float32") == [{half, single}, {single}, {single}, {single}, {single}]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("decode", "3 64"), ("cache", "2 2 8 24"), ("attention", "2 4 2 40"), ("samples, float16", "2 5 36")],
)
def test_output_shapes(name: str, shape: str) -> None:
    example = EXAMPLES[name]()
    node = example.node()
    said = drive([*node.lines(), f"build {node.op}"], driver=False)
    assert said.one("shape") == f"{TYPES[example.dtype]} {shape}"
    assert said.one("interface").split()[0] == ("2" if name == "cache" else "1")


def _workspace(name: str, tokens: int, most: int) -> int:
    example = EXAMPLES[name]()
    rows = ("hidden", "expert_ids", "expert_weights", "out")
    node = example.node(most={each: (most, 64 if each in ("hidden", "out") else 2) for each in rows})
    for tensor in (*node.inputs[:3], *node.outputs):
        assert tensor.dims[0] == tokens
    return int(drive([*node.lines(), f"build {node.op}"], driver=False).one("workspace"))


def test_workspace_is_that_of_the_profiles_largest_shape() -> None:
    """By hand: decode 6 routes of 48 floats; prefill 1000 routes with 4 experts in blocks of 128 rows; padded to 256."""
    assert _workspace("decode", 3, 3) == 1280
    blocks = (1000 + 4 * 127) // 128
    buffers = [blocks * 128 * 4, blocks * 4, blocks * 128 * 48 * 2, 1000 * 64 * 2]
    assert _workspace("decode", 3, 500) == sum(-(-each // 256) * 256 for each in buffers)


@pytest.mark.parametrize("profile", ["empty", "zeros"])
def test_a_profile_that_says_nothing_leaves_the_networks_own_shapes(profile: str) -> None:
    """TensorRT 10.3 passes such bounds to configurePlugin."""
    for name, example in {name: EXAMPLES[name]() for name in ("decode", "cache", "attention")}.items():
        build = [*example.node().lines(), f"build {example.op}"]
        usual = drive(build, driver=False)
        said = drive([f"profile {profile}", *build], driver=False)
        assert said.one("workspace") == usual.one("workspace"), name
        assert not said.all("log")
        assert not said.all("failed")


@pytest.mark.parametrize("profile", ["empty", "zeros"])
def test_no_workspace_is_guessed_for_shapes_that_nobody_bounds(profile: str) -> None:
    example = EXAMPLES["decode"]()
    node = example.node(
        most={"hidden": (500, 64), "expert_ids": (500, 2), "expert_weights": (500, 2), "out": (500, 64)}
    )
    said = drive([f"profile {profile}", *node.lines(), f"build {node.op}"], driver=False)
    assert said.one("workspace") == "0"
    (sentence,) = said.all("log")
    assert sentence.startswith(
        "ExpertDispatch: input 0 (hidden) has the shape [?, 64], and the profile says no largest one"
    )
