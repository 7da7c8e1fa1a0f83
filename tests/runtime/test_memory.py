from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

import moiie_runtime as mr
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.memory import MemoryEstimate, Request, check_memory, estimate_memory


@pytest.fixture(scope="module")
def bundle(golden_bundle) -> Bundle:
    return Bundle.open(golden_bundle("moiie_phi3"))


def test_weights_are_counted_once_and_the_tower_only_with_pictures(bundle):
    residency = bundle.residency
    text, pictures = estimate_memory(bundle), estimate_memory(bundle, Request(images=True))
    assert text.weights == residency["prefill"].bytes > residency["decode"].bytes
    assert pictures.weights == residency["prefill"].bytes + residency["vision_encoder"].bytes
    assert text.copies == 0


def test_float16_weights_are_copied_for_each_graph(bundle):
    stored = bundle.residency["prefill"].bytes + bundle.residency["decode"].bytes
    estimate = estimate_memory(replace(bundle, dtype="float16"))
    assert 2 * stored <= estimate.copies <= 2.2 * stored
    assert estimate.weights == 0


def test_the_cache_grows_with_the_request_up_to_the_capacity(bundle):
    model = bundle.model
    token = 2 * 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    assert estimate_memory(bundle, Request(batch=3, prompt_tokens=10, new_tokens=5)).kv_cache == 3 * 15 * token
    assert estimate_memory(bundle, Request(prompt_tokens=4000, new_tokens=500)).kv_cache == 4096 * token


def test_beams_take_rows_of_the_cache_and_of_the_logits_but_not_of_the_prefill(bundle):
    one, five = (
        estimate_memory(bundle, Request(batch=2, prompt_tokens=100, new_tokens=5, num_beams=beams)) for beams in (1, 5)
    )
    assert five == replace(one, kv_cache=5 * one.kv_cache, logits=5 * one.logits)
    everything = Request(batch=2, prompt_tokens=100, new_tokens=5, all_logits=True)
    assert (
        estimate_memory(bundle, everything).logits == estimate_memory(bundle, replace(everything, num_beams=5)).logits
    )


def test_every_part_grows_with_the_request(bundle):
    small = estimate_memory(bundle, Request(prompt_tokens=100))
    large = estimate_memory(bundle, Request(prompt_tokens=1000, batch=2, all_logits=True))
    assert large.activations > 20 * small.activations
    assert large.logits == 2000 * small.logits
    assert small.total < large.total


def test_the_line_to_print():
    estimate = MemoryEstimate(weights=3 * 2**30, copies=0, kv_cache=2**20, activations=512, logits=2048, process=2**20)
    assert str(estimate) == (
        "3.0 GiB (weights 3.0 GiB, copies 0 B, kv cache 1.0 MiB, activations 512 B, logits 2.0 KiB, "
        "pictures 0 B, process 1.0 MiB)"
    )


def test_a_limit_is_refused_with_numbers_and_a_fix(bundle):
    estimate = estimate_memory(bundle)
    check_memory(estimate, estimate.total, bundle)
    check_memory(estimate, None, bundle)
    with pytest.raises(
        MissingDependency, match=r"predicted memory 10\d\.\d MiB .* exceeds the limit of 50\.0 MiB"
    ) as caught:
        check_memory(estimate, 50 * 2**20, bundle)
    assert "shorter prompt" in caught.value.hint
    with pytest.raises(MissingDependency) as caught:
        check_memory(replace(estimate, copies=1), 1, bundle)
    assert "export with dtype float32" in caught.value.hint


def test_load_and_requests_obey_the_limit_before_a_graph_is_read(golden_bundle, tmp_path, bundle):
    copy = tmp_path / "bundle"
    shutil.copytree(golden_bundle("moiie_phi3"), copy)
    for graph in copy.glob("onnx/*.onnx"):  # same size, no graph: reading it would be another error
        graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(MissingDependency, match="exceeds the limit"):
        mr.load(copy, memory_limit="50MiB")
    limit = estimate_memory(bundle, Request(prompt_tokens=200, new_tokens=5)).total
    with mr.load(copy, memory_limit=limit) as vlm:
        picture = np.zeros((4, 4, 3), np.uint8)
        with pytest.raises(MissingDependency, match="exceeds the limit"):
            vlm.generate([{"role": "user", "content": [picture, "Q"]}], max_new_tokens=5)
        with pytest.raises(MissingDependency, match="exceeds the limit"):
            vlm.generate([{"role": "user", "content": "Q"}], max_new_tokens=3000)
        with pytest.raises(MoiieError, match="cannot load the graph"):
            vlm.generate([{"role": "user", "content": "Q"}], max_new_tokens=5)
