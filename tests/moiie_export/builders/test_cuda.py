"""The `ort-cuda` target, run by ONNX Runtime's CPU provider on an emulated device: no GPU is here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import moiie_runtime as mr
from moiie_export.builders import BuildRequest, BuildResult, build, plan
from moiie_export.targets import find_target
from moiie_runtime.backends import onnxruntime_cuda
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.tensors import TensorFile
from tests.exports import FUSIBLE, MIXED_RULES, exported
from tests.host_device import HostDevice, emulate

PRECISIONS = {"float32": 1e-5, "float16": 0.02}
"""Precision -> largest difference of logits, as a share of the largest."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`plain` or `quantised` -> a bundle of its own."""
    made: dict[str, Path] = {}

    def copy(kind: str) -> Path:
        if kind not in made:
            quantised = {**FUSIBLE, "layers": 2}, "float32", 256, MIXED_RULES
            plain = {**FUSIBLE, "layers": 1, "moe_layers": "all"}, "float16", 256
            source = exported(*(quantised if kind == "quantised" else plain)).bundle
            made[kind] = Path(shutil.copytree(source, tmp_path_factory.mktemp("cuda") / "bundle"))
        return made[kind]

    return copy


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[HostDevice]:
    return emulate(monkeypatch)


def built(bundle: Path, **settings: Any) -> BuildResult:
    return build(BuildRequest(bundle, replace(find_target("ort-cuda"), **settings), force=True), lambda *_: None)


def answer(bundle: Path, target: str, tokens: int = 6) -> mr.Generation:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    with mr.load(bundle, target=target) as vlm:
        record = mr.Record(prefill_logits="all", routing=vlm.bundle.model.moe is not None)
        question = [{"role": "user", "content": [picture, "What is this? " * 3]}]
        return vlm.generate(question, record=record, max_new_tokens=tokens)


def error(found: mr.Generation, wanted: mr.Generation) -> float:
    assert found.prefill_logits is not None
    assert wanted.prefill_logits is not None
    return float(np.abs(found.prefill_logits - wanted.prefill_logits).max() / np.abs(wanted.prefill_logits).max())


def nodes(path: Path) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize("kind", ["plain", "quantised"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_answers_as_the_bundle(
    bundles: Callable[[str], Path], devices: list[HostDevice], kind: str, precision: str
) -> None:
    bundle = bundles(kind)
    built(bundle, precision=precision)
    wanted, found = answer(bundle, "portable"), answer(bundle, "ort-cuda")
    assert error(found, wanted) < PRECISIONS[precision]
    assert found.token_ids == wanted.token_ids
    assert devices[0].closed
    assert not devices[0].held, "every buffer was given back"


@pytest.mark.parametrize("name", ["moiie_phi3", "modality_hard_phi3", "dense_phi3"])
def test_golden_models_write_the_same_tokens(
    golden_bundle: Callable[[str], Path], devices: list[HostDevice], tmp_path: Path, name: str
) -> None:
    bundle = Path(shutil.copytree(golden_bundle(name), tmp_path / "bundle"))
    built(bundle)
    assert answer(bundle, "ort-cuda").token_ids == answer(bundle, "portable").token_ids


def test_everything_that_has_a_fused_op_uses_it(bundles: Callable[[str], Path]) -> None:
    contrib = "com.microsoft"
    plain, quantised = built(bundles("plain")).path, built(bundles("quantised")).path
    for phase in ("prefill", "decode"):
        for path, experts in ((plain, "MoE"), (quantised, "MatMulNBits")):
            found = nodes(path / f"decoder_{phase}.onnx")
            for op in (experts, "GroupQueryAttention", "SkipSimplifiedLayerNormalization"):
                assert (contrib, op) in found
            assert not found & {("moiie", "CachedAttention"), ("moiie", "ExpertDispatch"), ("", "DequantizeLinear")}


def test_float32_keeps_the_attention_that_has_kernels(bundles: Callable[[str], Path]) -> None:
    found = nodes(built(bundles("plain"), precision="float32").path / "decoder_decode.onnx")
    assert ("moiie", "CachedAttention") in found
    assert ("com.microsoft", "GroupQueryAttention") not in found


def test_prefill_and_decode_read_one_stack_of_experts(bundles: Callable[[str], Path]) -> None:
    path = built(bundles("plain")).path
    document = json.loads((path / "engine.json").read_text("utf-8"))
    phases = [{*document["residency"][phase]["weights"]} for phase in ("prefill", "decode")]
    stacks = [{name for name in phase if ".experts." in name} for phase in phases]
    assert stacks[0] == stacks[1]
    assert document["needs"] == {"onnxruntime": "1.27"}
    with TensorFile(path / "weights.safetensors") as file:
        assert {info.dtype for info in file.header.values()} == {"F16", "F32"}  # routers stay float32
        assert all(file.header[name].dtype == "F16" for name in stacks[0])


def test_a_stack_pairs_gate_and_up(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("plain")
    path = built(bundle, precision="float32").path
    with TensorFile(path / "weights.safetensors") as file, TensorFile(bundle / "onnx/weights.safetensors") as source:
        stored = np.asarray(source["decoder.layers.0.mlp.experts.gate_up_proj"], np.float32)
        paired = file["decoder.layers.0.mlp.experts.gate_up_proj.paired.float"]
        half = stored.shape[1] // 2
        np.testing.assert_array_equal(paired[:, 0::2], stored[:, :half])
        np.testing.assert_array_equal(paired[:, 1::2], stored[:, half:])


def test_sessions_share_weights_for_as_long_as_they_are_open(
    bundles: Callable[[str], Path], devices: list[HostDevice]
) -> None:
    bundle = bundles("plain")
    built(bundle)
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.engines import open_engine

    engine = open_engine(Bundle.open(bundle), "ort-cuda")
    shared = engine.options().shared
    assert isinstance(shared, onnxruntime_cuda.OrtWeights)
    prefill, decode = shared.of("decoder_prefill"), shared.of("decoder_decode")
    both = {*prefill} & {*decode}
    assert both
    assert all(prefill[name] is decode[name] for name in both)
    del decode, prefill
    assert not shared._values


def test_a_target_may_let_go_of_the_encoder(bundles: Callable[[str], Path], devices: list[HostDevice]) -> None:
    bundle = bundles("plain")
    built(bundle)
    wanted = answer(bundle, "ort-cuda")
    built(bundle, residency="after_prefill")
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    with mr.load(bundle, target="ort-cuda", feature_cache=0) as vlm:
        for _ in range(2):
            question = [{"role": "user", "content": [picture, "What is this? " * 3]}]
            assert vlm.generate(question, max_new_tokens=6).token_ids == wanted.token_ids
            assert vlm._decoder._sessions.opened == ("decoder_decode",)


def test_building_again_gives_the_same_bytes_of_the_size_that_was_planned(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("quantised")
    planned = plan(BuildRequest(bundle, find_target("ort-cuda"), force=True))
    first = built(bundle)
    assert built(bundle).files == first.files
    assert planned.disk_bytes == first.files["weights.safetensors"]["bytes"]
    assert plan(BuildRequest(bundle, find_target("ort-cuda"))).cached


def test_bfloat16_is_refused(bundles: Callable[[str], Path]) -> None:
    with pytest.raises(MoiieError, match="bfloat16 is not written for ONNX Runtime"):
        built(bundles("plain"), precision="bfloat16")


def test_formats_without_kernels_are_refused(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles("plain"), tmp_path / "bundle"))
    document = json.loads((bundle / "bundle.json").read_text("utf-8"))
    document["quantization"] = {"weights": {"lm_head.weight": {"format": "fp8"}}}
    (bundle / "bundle.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(MoiieError, match="no kernels for fp8"):
        built(bundle)


def test_without_a_gpu_it_says_what_is_missing(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("plain")
    built(bundle)
    with pytest.raises(MissingDependency) as caught:
        mr.load(bundle, target="ort-cuda")
    assert caught.value.hint


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "quantised"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_answers_as_the_bundle(bundles: Callable[[str], Path], kind: str, precision: str) -> None:
    """With onnxruntime-gpu in place of onnxruntime; the one test here that needs the real provider."""
    bundle = bundles(kind)
    built(bundle, precision=precision)
    wanted, found = answer(bundle, "portable"), answer(bundle, "ort-cuda")
    assert error(found, wanted) < {"float32": 1e-4, "float16": 0.05}[precision]
