"""Wrong input ends in a sentence that names it, in TensorRT's log; the library never crashes and never guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.plugins.cpp.nodes import EXAMPLES, Example
from tests.plugins.cpp.shell import Said, drive


def _int4(bits: Sequence[int], group_size: Sequence[int]) -> Mapping[str, Sequence[int]]:
    return {"experts": [1, 4], "bits": bits, "group_size": group_size}


ATTRIBUTES = [
    ("decode", {}, "attribute 'experts' is missing"),
    ("decode", {"experts": [0, 2, 3, 63], "banks": [1]}, "there is no attribute 'banks'; the attributes are experts"),
    ("decode", {"experts": [0, 3, 2, 63]}, "attribute 'experts' names 2 after 3; ids ascend and lie between 0 and 63"),
    ("decode", {"experts": [0, 2, 3, 64]}, "attribute 'experts' names 64 after 3; ids ascend and lie between 0 and 63"),
    ("decode", {"experts": []}, "attribute 'experts' names no expert"),
    ("decode", {"experts": 1.5}, "attribute 'experts' is 1.5; expected a whole number"),
    (
        "decode, int4 of 32",
        _int4([3], [32]),
        "attribute 'bits' is 3; expected 4 or 8",
    ),
    (
        "decode, int4 of 32",
        _int4([4, 4], [32]),
        "attribute 'bits' has 2 values; expected 1",
    ),
    (
        "decode, int4 of 32",
        {"experts": [1, 4], "bits": [4], "group_size": [48]},
        "attribute 'group_size' is 48; expected 32, 64 or 128",
    ),
    ("attention", {"window": [-1]}, "attribute 'window' is -1; expected 0 (none) or a number of keys"),
    ("attention", {"scale": -0.5}, "attribute 'scale' is -0.5; expected 0 (1/sqrt of the head size) or more"),
]

SHAPES = [
    ("decode", {"expert_ids": (4, 2)}, "input 1 (expert_ids) has the shape [4, 2]; axis 0 ('T') must be 3, not 4"),
    (
        "decode",
        {"gate_up": (4, 96, 65)},
        "input 3 (gate_up) has the shape [4, 96, 65]; axis 2 ('H') must be 64, not 65",
    ),
    ("decode", {"gate_up": (4, 95, 64)}, "input 3 (gate_up): 95 is no length for an axis '2*I'"),
    ("decode", {"gate_up": (3, 96, 64)}, "input 3 (gate_up) has the shape [3, 96, 64]; axis 0 ('n') must be 4, not 3"),
    ("decode", {"hidden": (1, 3, 64)}, "input 0 (hidden) has 3 axes [1, 3, 64]; expected 2"),
    (
        "decode, fp8",
        {"gate_up_scales": (2, 95)},
        "input 5 (gate_up_scales) has the shape [2, 95]; axis 1 ('2*I') must be 96",
    ),
    ("decode, int4 of 32", {"gate_up": (2, 64, 64)}, "axis 2 ('H/values_per_byte') must be 32, not 64"),
    (
        "decode, int4 of 32",
        {"hidden": (2, 48)},
        "[2, 64, 32]; axis 2 ('H/values_per_byte') must be 24",
    ),
    ("cache", {"update": (2, 2, 9, 24)}, "input 1 (update) holds 9 tokens, more than the 8 slots of input 0 (cache)"),
    ("cache", {"update": (2, 3, 3, 24)}, "input 1 (update) has the shape [2, 3, 3, 24]; axis 1 ('G') must be 2, not 3"),
    ("attention", {"query": (2, 5, 2, 40)}, "input 0 (query) has 5 heads, no multiple of the 2 of input 1 (key)"),
    (
        "attention",
        {"query": (2, 4, 2, 160), **dict.fromkeys(("key", "value"), (2, 2, 300, 160))},
        "input 0 (query) has heads of 160 values; the kernels take up to 128",
    ),
    ("samples, float32", {"points": (2, 5, 3, 4, 3)}, "axis 4 ('2') must be 2, not 3"),
]

KINDS = [
    ("decode", {"hidden": torch.float32}, "input 0 (hidden) is float32; expected float16 or bfloat16"),
    ("decode", {"gate_up": torch.bfloat16}, "input 3 (gate_up) is bfloat16; expected float16, as input 0"),
    ("decode", {"expert_ids": torch.int64}, "input 1 (expert_ids) is int64; expected int32"),
    ("decode, int4 of 32", {"gate_up": torch.float16}, "input 3 (gate_up) is float16; expected int8"),
    ("decode, fp8", {"gate_up": torch.int8}, "input 3 (gate_up) is int8; expected float8e4m3"),
    ("decode, fp8", {"down_scales": torch.float16}, "input 6 (down_scales) is float16; expected float32"),
    ("attention", {"past_lengths": torch.int64}, "input 3 (past_lengths) is int64; expected int32"),
]


def _build(example: Example) -> list[str]:
    return [*example.node().lines(), f"build {example.op}"]


def _refused(example: Example) -> str:
    said = drive(_build(example), driver=False)
    assert said.all("failed") == [f"build {example.op}"]
    return " ".join(said.all("log"))


@pytest.mark.parametrize(("name", "attributes", "sentence"), ATTRIBUTES, ids=[each[2] for each in ATTRIBUTES])
def test_attributes(name: str, attributes: Mapping[str, Sequence[int] | float], sentence: str) -> None:
    example = EXAMPLES[name]()
    assert _refused(replace(example, attributes=attributes)) == f"{example.op} 'node': {sentence}"


@pytest.mark.parametrize(("name", "dims", "sentence"), SHAPES, ids=[each[2] for each in SHAPES])
def test_shapes(name: str, dims: Mapping[str, Sequence[int]], sentence: str) -> None:
    example = EXAMPLES[name]()
    changed = {key: torch.zeros(dims.get(key, value.shape), dtype=value.dtype) for key, value in example.inputs.items()}
    said = _refused(replace(example, inputs=changed))
    assert said.startswith(f"{example.op}: ")
    assert sentence in said


@pytest.mark.parametrize(("name", "kinds", "sentence"), KINDS, ids=[each[2] for each in KINDS])
def test_types(name: str, kinds: Mapping[str, torch.dtype], sentence: str) -> None:
    example = EXAMPLES[name]()
    changed = {key: value.to(kinds.get(key, value.dtype)) for key, value in example.inputs.items()}
    assert _refused(replace(example, inputs=changed)) == f"{example.op}: {sentence}"


def test_a_missing_input() -> None:
    example = EXAMPLES["decode"]()
    few = {name: value for name, value in example.inputs.items() if name != "down"}
    assert _refused(replace(example, inputs=few)) == "ExpertDispatch: the node has 4 inputs; expected 5"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("decode", "ExpertDispatch in bfloat16 with weights in bfloat16 and 6 routes"),
        (
            "decode, fp8",
            "Fp8ExpertDispatch in bfloat16 with weights in fp8 and 4 routes; fp8 weights need SM89 or above",
        ),
    ],
)
def test_types_without_kernels(name: str, sentence: str) -> None:
    """The tests' library holds no bfloat16 kernels."""
    example = EXAMPLES[name]()
    changed = {
        name: value.bfloat16() if value.dtype == torch.float16 else value for name, value in example.inputs.items()
    }
    assert f"the library holds no kernels for {sentence}" in _refused(replace(example, inputs=changed))


@pytest.mark.parametrize(
    ("sm", "sentence"),
    [
        (
            "75",
            "has no code for SM75 (there is SM89, PTX from SM89); build the library for it: moiie plugins build --sm 75",
        ),
        ("90", None),  # PTX of an older SM runs
        ("120", None),
    ],
)
def test_a_device_that_the_library_holds_no_cubins_for(sm: str, sentence: str | None, tmp_path: Path) -> None:
    said = _on_device(tmp_path, {"STUB_SM": sm})
    if sentence is None:
        assert not said.all("failed")
    else:
        assert said.one("log").startswith("ExpertDispatch: kernel 'expert_decode_gate_up.float16")
        assert sentence in said.one("log")


def test_a_device_that_is_too_old_for_fp8(tmp_path: Path) -> None:
    said = _on_device(tmp_path, {"STUB_SM": "86"}, name="decode, fp8")
    assert said.one("log") == (
        "Fp8ExpertDispatch: kernel 'expert_decode_gate_up.float16.fp8' needs SM89 or above; this GPU is SM86: "
        "export the bundle with int8 or int4 instead of fp8 for it"
    )


def test_a_machine_without_a_driver(tmp_path: Path) -> None:
    said = _on_device(tmp_path, {}, driver=False)
    assert "libcuda.so.1" in said.one("log")
    assert "kernels run on a machine with an NVIDIA GPU and its driver only" in said.one("log")


def test_a_thread_without_a_context(tmp_path: Path) -> None:
    said = _on_device(tmp_path, {"STUB_NO_CONTEXT": "1"})
    assert said.one("log") == "ExpertDispatch: the calling thread has no CUDA context"


def test_a_tensor_at_an_odd_address(tmp_path: Path) -> None:
    example = EXAMPLES["decode"]()
    arena = tmp_path / "arena"
    arena.write_bytes(bytes(1 << 16))
    node = example.node({"gate_up": 4104})
    said = drive([f"arena {arena} {1 << 16}", *node.lines(), f"build {node.op}", "run 256"])
    assert "buffer 'gate_up' begins at 0x" in said.one("log")
    assert "which is no multiple of 16 bytes" in said.one("log")


def _on_device(folder: Path, environment: Mapping[str, str], driver: bool = True, name: str = "decode") -> Said:
    """A node that is built and run over an arena of zeros."""
    arena = folder / "arena"
    arena.write_bytes(bytes(1 << 16))
    lines = [f"arena {arena} {1 << 16}", *_build(EXAMPLES[name]()), "run 256"]
    said = drive(lines, environment, driver=driver)
    assert said.all("failed") in ([], ["run 256"])
    return said
