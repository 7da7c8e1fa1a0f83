"""A bundle with weights in few bits, whole: what its manifest says, what each phase holds, what it answers and takes."""

from __future__ import annotations

import pytest
from PIL import Image

import moiie_runtime as mr
from moiie_export.cli.weights import weight_summary
from moiie_runtime.bundle import Bundle
from moiie_runtime.memory import Request, estimate_memory
from moiie_runtime.quantized_weights import unpacking
from moiie_runtime.residency import stored_tensor, weight_views
from moiie_runtime.tensors import TensorInfo, read_header
from tests.exports import exported
from tests.moiie_export.parity.conftest import CONTEXT
from tests.moiie_export.parity.test_quantised import RULES, SETTINGS

EXPERT = "decoder.layers.1.mlp.experts.{}.down_proj"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(exported(SETTINGS, max_context=CONTEXT, rules=RULES).bundle)


def test_the_manifest_names_every_quantised_tensor(bundle: Bundle) -> None:
    header = read_header(bundle.path("onnx/weights.safetensors"))
    entries = bundle.raw["quantization"]["weights"]
    assert {name for name in header if f"{name}.scales" in header} == set(entries)
    assert entries["decoder.lm_head.weight"] == {"format": "int8", "group_size": 64, "method": "rtn"}
    assert entries[EXPERT.format(1)]["format"] == bundle.quantization[EXPERT.format(1)] == "int4"
    assert EXPERT.format(0) not in entries
    assert bundle.verify() == []


def test_each_phase_holds_numbers_and_scales_of_its_weights(bundle: Bundle) -> None:
    header = read_header(bundle.path("onnx/weights.safetensors"))
    prefill, decode = (set(bundle.residency[phase].weights) for phase in ("prefill", "decode"))
    for expert in range(4):
        beside = {EXPERT.format(expert)} | ({f"{EXPERT.format(expert)}.scales"} if expert else set())
        assert beside <= prefill
        assert beside <= decode if expert else not beside & decode, "expert 0 is vision's alone"
    for phase in ("prefill", "decode"):
        views = list(weight_views(header, bundle.residency[phase].weights))
        assert sum(view.nbytes for view in views) == bundle.residency[phase].bytes
    assert set(bundle.raw["completeness"]["tensors"]) >= {
        "lm_head.weight",
        "model.layers.1.mlp.experts.0.down_proj.weight",
    }


def test_it_answers_with_and_without_a_picture(bundle: Bundle) -> None:
    with mr.load(bundle.root) as vlm:
        for images in ([], [Image.new("RGB", (30, 30), "red")]):
            prompt = "USER: <image> What? ASSISTANT:" if images else "USER: What? ASSISTANT:"
            answer = vlm.generate_prompt(prompt, images, max_new_tokens=5)
            assert len(answer.token_ids) == 5


def test_inspect_counts_every_byte_once_by_bank(bundle: Bundle) -> None:
    summary = weight_summary(bundle)
    forms = [each for bank in summary["by_bank"].values() for each in bank.values()]
    assert sum(each["bytes"] for each in forms) == summary["bytes"]
    assert set(summary["by_bank"]["vision_experts"]) == {"float16"}
    assert set(summary["by_bank"]["shared_experts"]) == {"int4"}
    assert summary["by_bank"]["attention"]["int8"]["parameters"] == 4


def test_memory_counts_scales_as_copies_and_an_expert_multiplied_out(bundle: Bundle) -> None:
    estimate = estimate_memory(bundle, Request(prompt_tokens=8, new_tokens=4))
    header = read_header(bundle.path("onnx/weights.safetensors"))
    halves = {
        phase: sum(_bytes(header, name, "F16") for name in bundle.residency[phase].weights)
        for phase in ("prefill", "decode")
    }
    assert estimate.copies == int(2.15 * sum(halves.values()))
    assert halves["prefill"] > halves["decode"] > 0
    gate_up, lm_head = 2 * 96 * 64, 272 * 64
    assert lm_head > gate_up
    plain = estimate_memory(Bundle(**{**vars(bundle), "quantization": {}}), Request(prompt_tokens=8, new_tokens=4))
    assert estimate.activations - plain.activations == 2 * int(1.5 * 4 * lm_head)


def _bytes(header: dict[str, TensorInfo], name: str, dtype: str) -> int:
    found = stored_tensor(header, name)
    assert found is not None
    return found[0].nbytes // found[1] if found[0].dtype == dtype else 0


def test_what_a_graph_takes_beside_its_weights() -> None:
    header = {
        "x.experts.up": TensorInfo("x.experts.up", "I8", (4, 6, 16), 0, 384),
        "x.experts.up.scales": TensorInfo("x.experts.up.scales", "F16", (4, 6, 1), 384, 48),
        "norm": TensorInfo("norm", "F32", (8,), 432, 32),
    }
    names = ["x.experts.1.up", "x.experts.1.up.scales", "norm", "unknown"]
    found = unpacking(header, names, {"x.experts.up": "int4"})
    assert found.half == 12
    assert found.floats == int(1.5 * 6 * 32 * 4)
