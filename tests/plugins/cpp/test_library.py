"""What TensorRT asks of a plugin library: creators, negotiation, shapes, workspace, and lives without memory errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.plugins.cpp.nodes import EXAMPLES
from tests.plugins.cpp.shell import SM, TYPES, Node, Said, drive, tools

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


def _bounded(tokens: int) -> Node:
    """`decode`, three tokens, in a network whose profile says that there are at most that many."""
    rows = {"hidden": (tokens, 64), "expert_ids": (tokens, 2), "expert_weights": (tokens, 2), "out": (tokens, 64)}
    return EXAMPLES["decode"]().node(most=rows)


def _run(folder: Path, *lines: str) -> tuple[Said, bool]:
    """What is said when a node is built and run over an arena of zeros, and whether anything was launched."""
    arena, log = folder / "arena", folder / "launches"
    arena.write_bytes(bytes(1 << 16))
    said = drive([f"arena {arena} {1 << 16}", *lines, "run 256"], {"STUB_LOG": str(log), "STUB_SM": str(SM)})
    return said, log.exists()


@pytest.mark.parametrize("profile", ["empty", "zeros"])
def test_without_a_largest_shape_no_workspace_is_guessed_and_nothing_is_launched(profile: str, tmp_path: Path) -> None:
    """TensorRT cannot be told while it asks: it reserves nothing, and the engine must not run in what it has not got."""
    node = _bounded(500)
    said, launched = _run(tmp_path, f"profile {profile}", *node.lines(), f"build {node.op}")
    assert said.one("workspace") == "0"
    unknown, refused = said.all("log")
    assert unknown.startswith(
        "ExpertDispatch: input 0 (hidden) has the shape [?, 64], and the profile says no largest one"
    )
    assert refused == (
        "ExpertDispatch: these shapes need a workspace of 1280 bytes, and the engine was built with 0: "
        "build it again with a profile that bounds them"
    )
    assert said.all("failed") == ["run 256"]
    assert not launched


@pytest.mark.parametrize(("most", "reserved", "fits"), [(1, 512, False), (3, 1280, True), (500, 269056, True)])
def test_shapes_beyond_the_profile_are_not_run(most: int, reserved: int, fits: bool, tmp_path: Path) -> None:
    node = _bounded(most)
    said, launched = _run(tmp_path, *node.lines(), f"build {node.op}")
    assert said.one("workspace") == str(reserved)
    assert launched is fits
    assert [
        f"a workspace of 1280 bytes, and the engine was built with {reserved}:" in line for line in said.all("log")
    ] == ([] if fits else [True])


def test_an_engine_that_does_not_say_its_workspace_runs(tmp_path: Path) -> None:
    """Engines of before it was kept."""
    node = _bounded(1)
    said, launched = _run(tmp_path, "without workspace_bytes", *node.lines(), f"build {node.op}")
    assert launched
    assert not said.all("log")
