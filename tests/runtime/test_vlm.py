from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import moiie_runtime as mr
from moiie_runtime.errors import MoiieError, Unsound
from moiie_runtime.vlm import VLM

TEXT = [{"role": "user", "content": "How many corners does a square have?"}]
PICTURE = [{"role": "user", "content": [np.zeros((9, 5, 3), np.uint8), "What is shown?"]}]


@pytest.fixture
def copied(golden_bundle, tmp_path):
    """A bundle that may be changed: a copy, with changes to its manifest."""

    def copy(change=lambda manifest: None, case="moiie_phi3") -> Path:
        root = tmp_path / case
        shutil.copytree(golden_bundle(case), root)
        path = root / "bundle.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        return root

    return copy


class Opened(list):
    """Opens real sessions and notes which."""

    def __init__(self, bundle):
        super().__init__()
        self._bundle = bundle

    def __call__(self, component):
        from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession

        self.append(component)
        return OnnxRuntimeSession(
            self._bundle.path(self._bundle.components[component].file), component=component, threads=1
        )


def test_graphs_are_loaded_when_they_are_needed(golden_bundle):
    bundle = mr.Bundle.open(golden_bundle("moiie_phi3"))
    opened = Opened(bundle)
    with VLM(bundle, opened) as vlm:
        assert opened == []
        vlm.generate(TEXT, max_new_tokens=1)
        assert opened == ["decoder_prefill"]
        stream = vlm.stream(PICTURE, max_new_tokens=2)
        assert opened == ["decoder_prefill"]
        next(stream)
        assert opened == ["decoder_prefill", "vision_encoder"]
        next(stream)
        assert opened == ["decoder_prefill", "vision_encoder", "decoder_decode"]
        vlm.generate_batch([TEXT, PICTURE], max_new_tokens=2)
        assert len(opened) == 3


def test_a_closed_model_says_so(golden_bundle):
    vlm = mr.load(golden_bundle("moiie_phi3"))
    vlm.close()
    vlm.close()
    with pytest.raises(MoiieError, match="the model is closed"):
        vlm.generate(TEXT)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(copied):
    def small(manifest):
        manifest["kv_cache"]["capacity"] = 120

    bundle = mr.Bundle.open(copied(small))
    vlm = VLM(bundle, lambda name: pytest.fail(f"{name} was loaded"))
    length = vlm.processor(TEXT).length
    assert 0 < 120 - length < 50
    with pytest.raises(MoiieError, match=rf"has {length} tokens and max_new_tokens is 50, .* context of 120") as caught:
        vlm.generate(TEXT, max_new_tokens=50)
    assert f"at most {120 - length} new tokens" in caught.value.hint
    with pytest.raises(MoiieError, match=r"has \d+ tokens \(729 of them for pictures\), but the context holds 120"):
        vlm.stream(PICTURE)
    with pytest.raises(MoiieError, match="context holds 120"):
        vlm.generate_batch([TEXT, PICTURE])


def test_the_default_length_gives_way_to_the_context_row_by_row(copied):
    def small(manifest):
        manifest["kv_cache"]["capacity"] = 1000

    vlm = VLM(mr.Bundle.open(copied(small)), lambda name: pytest.fail(f"{name} was loaded"))
    prompts = [vlm.processor(messages) for messages in (TEXT, PICTURE)]
    answers = vlm._answers(prompts, {}, mr.Record())
    assert [answer.config.max_new_tokens for answer in answers] == [256, 1000 - prompts[1].length]
    assert 0 < 1000 - prompts[1].length < 256


def test_truncated_and_missing_files_are_refused_at_load(copied):
    root = copied()
    weights = root / "onnx" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (root / "onnx" / "decoder_decode.onnx").unlink()
    with pytest.raises(Unsound, match=r"decoder_decode\.onnx: is missing; .*weights\.safetensors: has \d+ bytes"):
        mr.load(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
        ({"threads": True}, "threads must be"),
        ({"threads": "2"}, "threads must be"),
        ({"target": "none"}, "not built for target 'none'"),
        ({"memory_limit": "lots"}, "a memory size must be"),
    ],
)
def test_bad_arguments_of_load(golden_bundle, arguments, message):
    with pytest.raises(MoiieError, match=message):
        mr.load(golden_bundle("moiie_phi3"), **arguments)


def test_bad_arguments_of_a_request(golden_bundle):
    with mr.load(golden_bundle("dense_phi3")) as vlm:
        with pytest.raises(MoiieError, match="unknown generation setting 'max_length'"):
            vlm.stream(TEXT, max_length=3)
        with pytest.raises(MoiieError, match="generation setting max_new_tokens must be"):
            vlm.generate(TEXT, max_new_tokens=0)
        with pytest.raises(MoiieError, match="no conversation to answer"):
            vlm.generate_batch([])
        with pytest.raises(MoiieError, match="a dense model has no experts"):
            vlm.generate(TEXT, record=mr.Record(routing=True))


def test_defaults_come_from_the_bundle(copied):
    def change(manifest):
        manifest["generation"] |= {"max_new_tokens": 4, "repetition_penalty": 1.3, "unknown": 1}

    with mr.load(copied(change), threads=1) as vlm:
        penalised = vlm.generate(TEXT, max_new_tokens=12)
        assert len(vlm.generate(TEXT).token_ids) == 4
        assert vlm.generate(TEXT, max_new_tokens=12, repetition_penalty=1.0).token_ids != penalised.token_ids


def test_bad_defaults_in_a_bundle_name_the_key(copied):
    def change(manifest):
        manifest["generation"]["top_p"] = 2

    with pytest.raises(MoiieError, match=r"bundle\.json: generation: generation setting top_p must be"):
        mr.load(copied(change))


def test_an_embedding_table_of_another_shape_is_refused(copied):
    def change(manifest):
        manifest["embed_tokens"]["tensor"] = "decoder.norm.weight"

    with pytest.raises(MoiieError, match=r"'decoder\.norm\.weight' must be float32 or float16 \[352, 32\]"):
        mr.load(copied(change))
