"""Parity can fail: each way of being another model is found, and its first wrong stage and layer named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import moiie_runtime.decoder as runtime
import moiie_runtime.processor
from moiie_export.parity import ParityCase, Report, check_parity
from moiie_runtime.prompt import Prompt
from moiie_runtime.tensors import read_header
from tests.conftest import GoldenCase
from tests.moiie_export.parity.conftest import WINDOW, Model, Tensors, change_graph, edit_manifest, sign

WEIGHTS = "onnx/weights.safetensors"
VALUES = ("finite", "routing", "router logits", "expert weights", "hidden states", "KV cache")


def expect(report: Report, stage: str, layer: int | None, phase: str = "") -> None:
    """The report fails, and first in this stage and layer."""
    first = report.first_failure
    assert not report
    assert first is not None, report.summary()
    assert (first.stage, first.layer, first.phase) == (stage, layer, phase), report.summary()
    assert report.to_dict()["passed"] is False
    json.dumps(report.to_dict(), allow_nan=False)
    if layer is not None:
        assert f"layer {layer}" in report.verdict()


def expect_values(report: Report, stage: str, layer: int) -> None:
    """Among the decoders' values alone, the first difference is in this stage and layer."""
    found = [check for check in report.failures if check.stage in VALUES and check.layer is not None]
    assert found, report.summary()
    assert (found[0].stage, found[0].layer) == (stage, layer), report.summary()
    assert min(check.layer for check in found if check.layer is not None) == layer


def swapped(tensors: Tensors, first: str, second: str) -> Tensors:
    names = [name for name in tensors if first in name]
    assert names
    pairs = {name: name.replace(first, second) for name in names}
    return tensors | {a: tensors[b] for a, b in pairs.items()} | {b: tensors[a] for a, b in pairs.items()}


def test_the_bundle_itself_passes(model: Model) -> None:
    report = model.parity()
    assert report, report.summary()


def test_experts_0_and_3_swapped(model: Model) -> None:
    bundle = model.with_tensors(lambda t: swapped(t, "layers.1.mlp.experts.0.", "layers.1.mlp.experts.3."))
    report = model.parity(bundle)
    expect(report, "hidden states", 1, "prefill")
    expect_values(report, "hidden states", 1)


def test_gates_exchanged(model: Model) -> None:
    bundle = model.with_tensors(lambda t: swapped(t, "layers.1.mlp.gate.", "layers.1.mlp.gate_vis."))
    report = model.parity(bundle)
    expect(report, "routing", 1, "prefill")
    assert report.first_failure is not None
    assert report.first_failure.where in ("layer 1 language", "layer 1 vision")
    expect_values(report, "routing", 1)


@pytest.mark.parametrize("module", ["layers.2.mlp", "layers.3.mlp.experts.1"])
def test_gate_and_up_halves_swapped(model: Model, module: str) -> None:
    name = f"model.{module}.gate_up_proj.weight"
    bundle = model.with_tensors(lambda t: t | {name: np.concatenate(np.split(t[name], 2)[::-1])})
    expect(model.parity(bundle), "hidden states", int(module.split(".")[1]), "prefill")


def test_expert_offset_0(model: Model) -> None:
    report = model.parity(model.with_config(expert_offset=0))
    expect(report, "attributes", 1, "decoder_prefill")
    assert report.first_failure is not None
    assert "language_experts is [0, 1, 2], expected [1, 2, 3]" in report.first_failure.note
    assert any(check.stage == "manifest" and check.where == "experts" for check in report.failures)
    expect_values(report, "routing", 1)


def test_a_longer_window(model: Model) -> None:
    report = model.parity(model.with_config(sliding_window=WINDOW + 1))
    expect(report, "attributes", 0, "decoder_prefill")
    assert any("sliding_window" in check.note for check in report.failures if check.stage == "manifest")
    expect_values(report, "hidden states", 0)


def test_another_hidden_state_of_the_tower(model: Model) -> None:
    report = model.parity(model.with_config(mm_vision_select_layer=-1))
    expect(report, "vision", None, "vision_encoder")
    assert report.first_failure is not None
    assert report.first_failure.where == "tower"
    assert not any(check.phase in ("prefill", "decode") for check in report.failures), "the decoders are not at fault"


def test_plain_vision_mask(model: Model) -> None:
    """The rule is obeyed by the host alone, so the bundle of such a checkpoint differs in its manifest alone."""
    bundle = model.copy_bundle()
    edit_manifest(bundle, lambda manifest: manifest["modality"].update(last_image_token_is_language=False))
    report = model.parity(bundle)
    expect(report, "manifest", 1)
    masks = [check for check in report.failures if check.stage == "modality"]
    assert {check.case for check in masks} == {"picture", "two pictures"}
    assert {check.layer for check in masks} == {1}
    assert "is 1, expected 0; 1 of" in masks[0].note


def test_processor_that_disobeys_its_own_manifest(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moiie_runtime.processor, "token_modality", lambda types, **_: types.astype(np.int32))
    expect(model.parity(), "modality", 1)


def shorten(graph: onnx.ModelProto, window: int) -> None:
    """Let the body of CachedAttention see one key fewer; the nodes' attributes still say `window`."""
    body = [node for function in graph.functions if function.name == "CachedAttention" for node in function.node]
    constants = [attribute for node in body if node.output[0] == "window" for attribute in node.attribute]
    assert constants
    for constant in constants:
        value = onnx.numpy_helper.to_array(constant.t) if constant.HasField("t") else np.int64(constant.i)
        assert int(value) == window
        if constant.HasField("t"):
            constant.t.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value - 1), constant.t.name))
        else:
            constant.i = window - 1


@pytest.mark.parametrize("component", ["decoder_prefill", "decoder_decode"])
def test_a_shorter_window_in_a_function_body(model: Model, component: str) -> None:
    """Only values can tell."""
    report = model.parity(model.with_graph(component, lambda graph: shorten(graph, WINDOW + 1)))
    expect(report, "hidden states", 0, component.removeprefix("decoder_"))


@pytest.mark.parametrize("component", ["decoder_prefill", "decoder_decode"])
def test_a_window_longer_than_every_prompt(
    golden_bundle: Callable[[str], Path], tmp_path: Path, component: str
) -> None:
    """No case reaches it; the made-up full cache does, and one key in 2048 shows."""
    golden = GoldenCase("moiie_phi3_text_only")
    bundle = Path(shutil.copytree(golden_bundle(golden.name), tmp_path / "bundle"))
    change_graph(bundle, component, lambda graph: shorten(graph, 2048))
    report = check_parity(bundle, golden.checkpoint, cases=[ParityCase("Why?")])
    expect(report, "hidden states", 0, component.removeprefix("decoder_"))
    assert report.first_failure is not None
    assert report.first_failure.case == "full cache"
    assert report.first_failure.value is not None
    assert report.first_failure.value > 10 * 2e-4


def test_attribute_of_a_node(model: Model) -> None:
    def change(graph: onnx.ModelProto) -> None:
        node = [node for node in graph.graph.node if node.op_type == "CachedAttention"][2]
        next(each for each in node.attribute if each.name == "local_window_size").i = 7

    expect(model.parity(model.with_graph("decoder_decode", change)), "attributes", 2, "decoder_decode")


def test_offsets_of_two_weights_swapped(model: Model) -> None:
    def change(graph: onnx.ModelProto) -> None:
        wanted = [f"decoder.layers.{layer}.self_attn.o_proj.weight" for layer in (2, 3)]
        first, second = (next(each for each in graph.graph.initializer if each.name == name) for name in wanted)
        places = [{entry.key: entry for entry in each.external_data} for each in (first, second)]
        assert places[0]["length"].value == places[1]["length"].value
        offsets = [place["offset"].value for place in places]
        for place, offset in zip(places, reversed(offsets), strict=True):
            place["offset"].value = offset

    expect(model.parity(model.with_graph("decoder_prefill", change)), "hidden states", 2, "prefill")


def flip(bundle: Path, name: str, bit: int) -> None:
    """Flip a bit of the first element of a stored weight."""
    info = read_header(bundle / WEIGHTS)[name]
    with (bundle / WEIGHTS).open("r+b") as file:
        file.seek(info.offset)
        value = int.from_bytes(file.read(4), "little") ^ (1 << bit)
        file.seek(info.offset)
        file.write(value.to_bytes(4, "little"))


def test_a_flipped_exponent(model: Model) -> None:
    bundle = model.copy_bundle()
    flip(bundle, "decoder.layers.2.mlp.down_proj.weight", 29)
    damaged = model.parity(bundle)
    expect(damaged, "files", None)
    assert damaged.first_failure is not None
    assert WEIGHTS in damaged.first_failure.note
    sign(bundle, WEIGHTS)
    expect(model.parity(bundle), "hidden states", 2, "prefill")


def test_a_flipped_last_bit_shows_in_the_stored_weights_alone(model: Model) -> None:
    bundle = model.copy_bundle()
    flip(bundle, "decoder.layers.3.mlp.experts.gate_up_proj", 0)
    sign(bundle, WEIGHTS)
    expect(model.parity(bundle), "stored weights", 3)


def test_a_flipped_bit_in_the_embedding(model: Model) -> None:
    bundle = model.copy_bundle()
    flip(bundle, "embed_tokens.weight", 0)
    sign(bundle, WEIGHTS)
    expect(model.parity(bundle), "embedding", None)


@pytest.mark.parametrize(
    ("weight", "stage", "phase", "where"),
    [
        ("vision_encoder.projector.2.weight", "vision", "vision_encoder", "projector"),
        ("decoder.lm_head.weight", "logits", "prefill", ""),
    ],
)
def test_a_flipped_exponent_outside_the_layers(model: Model, weight: str, stage: str, phase: str, where: str) -> None:
    bundle = model.copy_bundle()
    flip(bundle, weight, 29)
    sign(bundle, WEIGHTS)
    report = model.parity(bundle)
    expect(report, stage, None, phase)
    assert report.first_failure is not None
    assert report.first_failure.where == where


def test_a_cache_that_is_not_what_attention_saw(model: Model) -> None:
    """Right answers now, wrong ones from the next step on."""

    def change(graph: onnx.ModelProto) -> None:
        node = [node for node in graph.graph.node if node.op_type == "CachedAttention"][2]
        assert node.output[2] == "present.2.value"
        node.output[2] = "kept"
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1.01]), "factor"))
        graph.graph.node.append(onnx.helper.make_node("Mul", ["kept", "factor"], ["present.2.value"]))

    expect(model.parity(model.with_graph("decoder_prefill", change)), "KV cache", 2, "prefill")


def test_another_tokenizer(model: Model) -> None:
    bundle = model.copy_bundle()
    path = bundle / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary["?"], vocabulary["!"] = vocabulary["!"], vocabulary["?"]
    path.write_text(json.dumps(document), encoding="utf-8")
    sign(bundle, "tokenizer.json")
    report = model.parity(bundle)
    expect(report, "prompt", None)
    assert report.first_failure is not None
    assert "token id at position" in report.first_failure.note


def test_a_host_that_puts_pictures_upside_down(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """All graphs are right; only the runtime's own answer is not."""
    right = runtime.Decoder.inputs_embeds

    def wrong(self: runtime.Decoder, prompt: Prompt, rows: np.ndarray | None = None) -> np.ndarray:
        return right(self, prompt, None if rows is None else rows[:, ::-1])

    monkeypatch.setattr(runtime.Decoder, "inputs_embeds", wrong)
    report = model.parity()
    expect(report, "answer logits", None)
    assert {check.stage for check in report.failures} <= {"answer logits", "text"}
    for case in report.to_dict()["cases"]:
        text, at = case["text"], case["text"]["diverges"]
        assert (text["reference_token"] is None) == (at is None)
        assert at is None or text["reference_ids"][at] != text["bundle_ids"][at]
    assert "text" not in {check.case for check in report.failures}, "no picture, no difference"


def test_nan_never_passes(model: Model) -> None:
    """Not even where the reference is NaN too."""
    bundle = model.copy_bundle()
    info = read_header(bundle / WEIGHTS)["decoder.layers.1.mlp.experts.down_proj"]
    with (bundle / WEIGHTS).open("r+b") as file:
        file.seek(info.offset)
        file.write(np.full(info.nbytes // 4, np.nan, np.float32).tobytes())
    sign(bundle, WEIGHTS)
    report = model.parity(bundle)
    expect(report, "finite", 1, "prefill")
    logits = [check for check in report.failures if check.stage == "logits"]
    assert logits
    assert all(np.isnan(check.value) for check in logits if check.case == "text" and check.value is not None)


def test_a_model_of_another_size_is_refused_before_anything_runs(
    model: Model, golden_bundle: Callable[[str], Path]
) -> None:
    report = model.parity(golden_bundle("dense_phi3"))
    expect(report, "names", 1)
    assert report.first_failure is not None
    assert report.first_failure.where == "decoder_prefill"
    assert report.checks[-1].status == "not run"
    assert any(check.stage == "shapes" for check in report.failures)


def test_a_manifest_of_other_tokens(model: Model) -> None:
    bundle = model.copy_bundle()
    edit_manifest(bundle, lambda manifest: manifest["tokens"].update(bos=2))
    report = model.parity(bundle)
    expect(report, "manifest", None)
    assert report.first_failure is not None
    assert report.first_failure.note == "tokens.bos is 2, expected 1"


def test_the_command_exits_3_and_names_the_layer(model: Model) -> None:
    bundle = model.with_tensors(lambda t: swapped(t, "layers.1.mlp.experts.0.", "layers.1.mlp.experts.3."))
    command = [
        sys.executable,
        "-m",
        "moiie_export.cli",
        "parity",
        str(bundle),
        "--checkpoint",
        str(model.base.checkpoint),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 3, result.stderr
    assert "error: " in result.stderr
    assert "layer 1: picture: prefill hidden states differ" in result.stderr
    assert "Traceback" not in result.stderr
    document = json.loads(result.stdout)
    assert (document["passed"], document["first_failure"]["layer"]) == (False, 1)
