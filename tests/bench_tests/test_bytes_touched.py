from __future__ import annotations

import copy

import pytest

from tests.bench.bytes_touched import bundle_bytes, decode_bytes
from tests.exports import SMALLEST, exported

TENSORS = {
    "embed_tokens.weight": ((100, 8), 3200),
    "decoder.layers.0.self_attn.qkv_proj.weight": ((24, 4), 96),
    "decoder.layers.0.self_attn.qkv_proj.weight.scales": ((24, 1), 48),
    "decoder.layers.1.mlp.experts.gate_up_proj": ((4, 32, 4), 512),
    "decoder.layers.1.mlp.experts.gate_up_proj.scales": ((4, 32, 1), 256),
    "decoder.layers.1.mlp.experts.down_proj": ((4, 8, 8), 256),
    "decoder.norm.weight": ((8,), 32),
}
MANIFEST = {
    "model": {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4, "moe": {"top_k": 2}},
    "kv_cache": {"dtype": "float32"},
    "residency": {
        "decode": {
            "weights": [
                "decoder.layers.0.self_attn.qkv_proj.weight",
                "decoder.layers.0.self_attn.qkv_proj.weight.scales",
                *(
                    f"decoder.layers.1.mlp.experts.{e}.{leaf}"
                    for e in (1, 2, 3)
                    for leaf in ("gate_up_proj", "down_proj")
                ),
                "decoder.norm.weight",
            ]
        }
    },
}


def test_a_token_reads_top_k_experts_and_each_weight_with_its_scales_once():
    touched = decode_bytes(MANIFEST, TENSORS)
    one_expert = (512 + 256 + 256) // 4
    assert touched.common == 96 + 48 + 32
    assert touched.experts == 2 * one_expert
    assert touched.resident == touched.common + 3 * one_expert
    assert touched.kv_per_position == 2 * 2 * 2 * 4 * 4
    assert touched.at(10) == touched.common + touched.experts + 10 * touched.kv_per_position


def test_listing_the_scales_or_not_changes_nothing():
    bare = copy.deepcopy(MANIFEST)
    bare["residency"]["decode"]["weights"].remove("decoder.layers.0.self_attn.qkv_proj.weight.scales")
    assert decode_bytes(bare, TENSORS) == decode_bytes(MANIFEST, TENSORS)


def test_a_half_precision_cache_is_half_as_large():
    half = {**MANIFEST, "kv_cache": {"dtype": "float16"}}
    assert 2 * decode_bytes(half, TENSORS).kv_per_position == decode_bytes(MANIFEST, TENSORS).kv_per_position


def test_experts_of_different_sizes_count_by_their_mean():
    tensors = {
        name: entry for name, entry in TENSORS.items() if "experts.gate_up" not in name and "experts.down" not in name
    }
    for expert, size in ((1, 100), (2, 200), (3, 600)):
        tensors[f"decoder.layers.1.mlp.experts.{expert}.gate_up_proj"] = ((32, 8), size)
    assert decode_bytes(MANIFEST, tensors).experts == pytest.approx(2 * 300)


def test_an_exported_bundle():
    """All of decode's experts are as large; two of the three that language reaches are read."""
    import json

    bundle = exported(SMALLEST).bundle
    touched = bundle_bytes(bundle)
    decode = json.loads((bundle / "bundle.json").read_text())["residency"]["decode"]["bytes"]
    assert touched.resident == decode
    assert touched.experts == pytest.approx((touched.resident - touched.common) * 2 / 3)
