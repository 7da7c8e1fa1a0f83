"""The `cpu` target: what is built answers as the bundle does, whatever kernels run it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import moiie_runtime as mr
from moiie_export.builders import BuildRequest, BuildResult, build, plan
from moiie_export.targets import Target, find_target
from moiie_runtime import native
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.tensors import TensorFile
from tests.exports import FUSIBLE, MIXED_RULES, SMALLEST, exported

MODEL = {**FUSIBLE, "layers": 2}
PROMPT = "What is this? " * 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("cpu") / "bundle"
    shutil.copytree(exported(MODEL, rules=MIXED_RULES, max_context=256).bundle, copy)
    return copy


@pytest.fixture(scope="module")
def portable(bundle: Path) -> mr.Generation:
    return answer(bundle, "portable")


@pytest.fixture(params=["kernels", "contrib"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "contrib":
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)


def built(bundle: Path, **settings: Any) -> BuildResult:
    target = replace(find_target("cpu"), **settings)
    return build(BuildRequest(bundle, target, force=True), lambda *_: None)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def answer(bundle: Path, target: str, **settings: Any) -> mr.Generation:
    from PIL import Image

    record = mr.Record(prefill_logits="all", step_logits=True, routing=True)
    with mr.load(bundle, target=target, **settings) as vlm:
        image = Image.fromarray(picture())
        return vlm.generate([{"role": "user", "content": [image, PROMPT]}], record=record, max_new_tokens=6)


def error(found: mr.Generation, wanted: mr.Generation) -> float:
    """Largest difference of prefill logits, as a share of the largest logit."""
    assert found.prefill_logits is not None
    assert wanted.prefill_logits is not None
    return float(np.abs(found.prefill_logits - wanted.prefill_logits).max() / np.abs(wanted.prefill_logits).max())


def agreement(found: mr.Generation, wanted: mr.Generation) -> float:
    """Share of the prompt's tokens that go to the same experts."""
    assert found.routing is not None
    assert wanted.routing is not None
    same = [
        (np.sort(found.routing.prefill[layer].expert_ids) == np.sort(routing.expert_ids)).all(axis=-1)
        for layer, routing in wanted.routing.prefill.items()
    ]
    return float(np.concatenate(same).mean())


def nodes(path: Path) -> list[tuple[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return [(node.domain, node.op_type) for node in model.graph.node]


def test_a_quantised_bundle_answers_as_the_portable_one(bundle: Path, portable: mr.Generation, kernels: str) -> None:
    built(bundle)
    found = answer(bundle, "cpu")
    assert 0 < error(found, portable) < 0.1  # activations are rounded to int8
    assert agreement(found, portable) > 0.9


def test_quantised_layers_use_the_kernels(bundle: Path, kernels: str) -> None:
    path = built(bundle).path
    wanted = {
        "kernels": {("moiie.cpu", op) for op in ("QLinear", "QExperts", "Route", "Attend")},
        "contrib": {("com.microsoft", op) for op in ("MatMulNBits", "GroupQueryAttention")},
    }[kernels]
    fused = {("com.microsoft", "SkipSimplifiedLayerNormalization")}
    for phase in ("prefill", "decode"):
        found = {*nodes(path / f"decoder_{phase}.onnx")}
        assert wanted | fused <= found
        assert not found & {("", "Gemm"), ("", "DequantizeLinear"), ("moiie", "CachedAttention")}


def test_decode_holds_no_vision_expert(bundle: Path) -> None:
    path = built(bundle).path
    document = json.loads((path / "engine.json").read_text("utf-8"))
    prefill, decode = (document["residency"][phase] for phase in ("prefill", "decode"))
    only_prefill = {*prefill["weights"]} - {*decode["weights"]}
    assert {name for name in only_prefill if ".experts." in name} == {
        f"decoder.layers.1.mlp.experts.0.{kind}_proj" for kind in ("gate_up", "down")
    }
    with TensorFile(path / "weights.safetensors") as file:
        assert decode["bytes"] == sum(file.header[name].nbytes for name in decode["weights"])
        assert all(info.offset % 64 == 0 for info in file.header.values() if info.dtype == "U8")


def test_half_precision_keys_cost_little(bundle: Path, portable: mr.Generation) -> None:
    built(bundle)
    full = error(answer(bundle, "cpu"), portable)
    built(bundle, kv_cache="float16")
    with mr.load(bundle, target="cpu") as vlm:
        assert vlm.bundle.kv_cache.dtype == "float16"
    assert error(answer(bundle, "cpu"), portable) < full + 0.01


def test_a_prompt_in_pieces_gives_the_same(bundle: Path) -> None:
    built(bundle)
    whole = answer(bundle, "cpu")
    built(bundle, prefill_chunk=5)
    pieces = answer(bundle, "cpu")
    assert pieces.token_ids == whole.token_ids
    assert error(pieces, whole) < 0.1  # the last bit of an activation decides how it is rounded
    assert agreement(pieces, whole) > 0.95


def test_a_batch_in_pieces_gives_what_each_gives_alone(bundle: Path) -> None:
    built(bundle, prefill_chunk=5)
    questions = ["What is this?", "Is it red, or is it blue, or is it anything else that has a colour?"]
    conversations = [[{"role": "user", "content": [text]}] for text in questions]
    with mr.load(bundle, target="cpu") as vlm:
        together = vlm.generate_batch(conversations, max_new_tokens=5)
        alone = [vlm.generate(conversation, max_new_tokens=5) for conversation in conversations]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_it_is_the_default_once_built(bundle: Path) -> None:
    built(bundle)
    with mr.load(bundle) as vlm:
        assert vlm.bundle.weights_file == "engines/cpu/weights.safetensors"
    with mr.load(bundle, target="portable") as vlm:
        assert vlm.bundle.weights_file == "onnx/weights.safetensors"


def test_a_second_build_does_nothing(bundle: Path) -> None:
    target = find_target("cpu")
    first = build(BuildRequest(bundle, target), lambda *_: None)
    before = (first.path / "engine.json").stat().st_mtime_ns
    assert build(BuildRequest(bundle, target), lambda *_: None).cached
    assert plan(BuildRequest(bundle, target)).cached
    assert (first.path / "engine.json").stat().st_mtime_ns == before


def test_a_plan_compiles_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: pytest.fail("the kernels were asked for"))
    assert plan(BuildRequest(bundle, find_target("cpu"), force=True)).notes == ()
    monkeypatch.setattr(native, "available", lambda: False)
    assert "no C++ compiler" in plan(BuildRequest(bundle, find_target("cpu"), force=True)).notes[0]


def test_a_compiler_that_comes_later_makes_another_build(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = BuildRequest(bundle, find_target("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(native, "available", lambda: False)
        build(replace(request, force=True), lambda *_: None)
        assert plan(request).cached
    assert not plan(request).cached
    path = build(request, lambda *_: None).path
    assert ("moiie.cpu", "QLinear") in nodes(path / "decoder_decode.onnx")
    monkeypatch.setattr(native, "LAYOUT", 999)
    assert not plan(request).cached, "weights in another layout are packed again"


def test_the_same_build_has_the_same_bytes(bundle: Path) -> None:
    assert built(bundle).files == built(bundle).files


def test_a_plan_knows_the_size(bundle: Path) -> None:
    planned = plan(BuildRequest(bundle, find_target("cpu"), force=True))
    assert planned.disk_bytes == built(bundle).files["weights.safetensors"]["bytes"]


def test_a_float_bundle_is_built_too(tmp_path: Path) -> None:
    settings = {**MODEL, "layers": 1, "moe_layers": "all"}
    copy = _copied(exported(settings, "float16", max_context=256).bundle, tmp_path)
    path = built(copy).path
    with TensorFile(path / "weights.safetensors") as file:
        assert {info.dtype for info in file.header.values()} == {"F32"}  # mapped as they are, instead of copies
    wanted = answer(copy, "portable")
    assert error(answer(copy, "cpu"), wanted) < 1e-5
    built(copy, prefill_chunk=5)
    assert error(answer(copy, "cpu"), wanted) < 1e-5


def _copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "bundle"))


def test_half_precision_keys_need_heads_that_attention_takes(tmp_path: Path) -> None:
    small = _copied(exported(SMALLEST).bundle, tmp_path)  # heads of 8
    with pytest.raises(MoiieError, match="multiple of 16, this model has 8"):
        built(small, kv_cache="float16")


def test_small_heads_keep_the_portable_attention(tmp_path: Path) -> None:
    path = built(_copied(exported(SMALLEST).bundle, tmp_path)).path
    assert ("moiie", "CachedAttention") in nodes(path / "decoder_decode.onnx")


def test_another_export_makes_it_stale(bundle: Path) -> None:
    built(bundle)
    document = bundle / "bundle.json"
    before = document.read_text("utf-8")
    try:
        data = json.loads(before)
        data["files"]["onnx/decoder_decode.onnx"]["sha256"] = "0" * 64
        document.write_text(json.dumps(data), "utf-8")
        with pytest.raises(MoiieError, match="built from another export") as caught:
            mr.load(bundle)
        assert "moiie build" in str(caught.value.hint)
    finally:
        document.write_text(before, "utf-8")


def test_a_missing_engine_is_named(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines", ignore_errors=True)
    with pytest.raises(MissingDependency, match="not built for target 'cpu'"):
        mr.load(bundle, target="cpu")


@pytest.fixture
def broken_file(bundle: Path) -> Iterator[Callable[[str], Path]]:
    built(bundle)
    yield lambda name: bundle / "engines" / "cpu" / name
    shutil.rmtree(bundle / "engines")


def test_a_truncated_weights_file_is_refused(bundle: Path, broken_file: Callable[[str], Path]) -> None:
    path = broken_file("weights.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MoiieError, match=r"engines/cpu/weights.safetensors: has \d+ bytes"):
        mr.load(bundle)


def test_weights_in_another_layout_are_refused(bundle: Path, broken_file: Callable[[str], Path]) -> None:
    path = broken_file("engine.json")
    document = json.loads(path.read_text("utf-8"))
    document["needs"]["moiie.cpu"] = "999"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(MissingDependency, match="layout 999"):
        mr.load(bundle)


def test_targets_are_not_mixed_up(bundle: Path) -> None:
    own: Target = replace(find_target("cpu"), name="mine", kv_cache="float16")
    build(BuildRequest(bundle, own), lambda *_: None)
    with mr.load(bundle, target="mine") as vlm:
        assert vlm.bundle.weights_file == "engines/mine/weights.safetensors"
