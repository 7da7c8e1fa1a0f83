"""MoME's weight map: the published counts, the reference model's parameters, and what stays float32."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import pytest
import torch

from moiie_export.config_reader import ConfigReader
from moiie_export.model.mome.model import MomeModel
from moiie_export.mome_config import MomeConfig
from moiie_export.mome_parser import parse_mome
from moiie_export.mome_published import PUBLISHED, TRAINABLE_VALUES
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_export.weights import CHECKPOINT, WeightMap, check_tensors
from moiie_runtime.errors import MoiieError

ROWS = 32000
TINY: dict[str, Any] = {
    "text_config": {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "vocab_size": 50,
    },
    "clip": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 18,
        "image_size": 28,
    },
    "dino": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 56,
        "adt": {"num_layers": 2, "num_heads": 4, "num_points": 3, "ffn_dim": 10},
    },
    "pix2struct": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "d_kv": 4,
        "d_ff": 14,
        "seq_len": 30,
        "adt": {"num_layers": 1, "num_heads": 2, "num_points": 2, "ffn_dim": 6},
    },
    "move_config": {"query_grid": [2, 2], "num_visual_tokens": 5, "router_hidden": 9},
    "mole_config": {"num_experts": 3, "bottleneck": 5, "router_hidden": 7, "layers": [0, 2]},
    "sentence_encoder_config": {
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 11,
        "vocab_size": 40,
        "max_position_embeddings": 256,
    },
}
"""Sizes that are all different where they can be, so that swapped ones are found."""


def parse(changes: dict[str, Any]) -> MomeConfig:
    raw = {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in PUBLISHED.items()
    }
    raw["vision_experts"] = [{**expert, **changes.get(expert["name"], {})} for expert in PUBLISHED["vision_experts"]]
    return parse_mome(ConfigReader(raw, "config.json"))


def build(config: MomeConfig, names: tuple[str, ...] = ()) -> WeightMap:
    return build_mome_weight_map(config, config.text.vocab_size, {CHECKPOINT: names})


@pytest.fixture(scope="module")
def published() -> WeightMap:
    return build(parse({}))


def is_trainable(tensor: str) -> bool:
    return tensor.startswith("move.") or ".mlp.mole." in tensor


def test_published_sizes_have_the_published_number_of_parameters(published: WeightMap) -> None:
    """Spec 1.4, less what no graph uses: DINO's larger position table and mask token, BERT's pooler."""
    found: Counter[str] = Counter()
    for weight in published.weights:
        for part in weight.parts:
            found["trainable" if is_trainable(part.tensor) else part.tensor.split(".")[0]] += prod(part.shape)
    assert found == {
        "language_model": 6_738_415_616,
        "clip_tower": 985_894_528 + 39 * 1408,  # zeros for the keys' bias
        "dino_tower": 304_368_640 - (37 * 37 - 32 * 32) * 1024 - 1024,
        "pix2struct_tower": 91_835_904,
        "sentence_encoder": 22_713_216 - 384 * 385,
        "trainable": 168_340_611,
    }
    assert found["trainable"] == TRAINABLE_VALUES


@pytest.mark.parametrize("changes", [{}, TINY], ids=["published", "tiny"])
def test_weights_are_the_parameters_of_the_model(changes: dict[str, Any]) -> None:
    config = parse(changes)
    with torch.device("meta"):
        model = MomeModel(config)
    mapped = {name: shape for name, (_, _, shape) in build(config).by_parameter().items()}
    assert mapped == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, TINY], ids=["published", "tiny"])
def test_parts_fill_their_weights_and_no_tensor_is_used_twice(changes: dict[str, Any]) -> None:
    weights = build(parse(changes)).weights
    tensors = [part.tensor for weight in weights for part in weight.parts]
    assert len(set(tensors)) == len(tensors)
    assert all(sum(prod(part.used_shape) for part in weight.parts) == prod(weight.shape) for weight in weights)


def test_order_of_what_is_fused_and_stacked(published: WeightMap) -> None:
    parts = {weight.name: [part.tensor for part in weight.parts] for weight in published.weights}
    block = "dino_tower.encoder.layer.7.attention.attention"
    assert parts["vision_dino.tower.layers.7.attention.qkv.bias"] == [
        f"{block}.{x}.bias" for x in ("query", "key", "value")
    ]
    block = "pix2struct_tower.encoder.layer.3.mlp"
    assert parts["vision_pix2struct.tower.layers.3.mlp.wi.weight"] == [f"{block}.wi_0.weight", f"{block}.wi_1.weight"]
    block = "move.dino.adt.layers.5.self_attn"
    assert parts["vision_dino.adt.layers.5.self_attn.qk_proj.weight"] == [
        f"{block}.q_proj.weight",
        f"{block}.k_proj.weight",
    ]
    layers = [f"language_model.model.layers.{n}.mlp.mole" for n in range(32)]
    assert parts["router.mole.fc2.bias"] == [f"{layer}.router.fc2.bias" for layer in layers]
    assert parts["mole.31.scale"] == [f"{layers[31]}.experts.{k}.scale" for k in range(4)]
    assert parts["decoder.layers.0.mlp.gate_up_proj.weight"] == [
        f"language_model.model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")
    ]


def test_what_half_precision_ruins_stays_float32(published: WeightMap) -> None:
    kept = {weight.name for weight in published.weights if weight.keep_float32}
    for weight in published.weights:
        routes = weight.name.startswith("router.")
        places = any(
            word in weight.name for word in ("reference_points", "position_embedding", "_embedder", "sampling_off")
        )
        vector = weight.name.endswith((".bias", ".scale")) or len(weight.shape) == 1
        token = weight.name.endswith(("class_embedding", "cls_token"))
        assert (weight.name in kept) == (routes or places or vector or token), weight.name
    # which leaves the bulk in the bundle's dtype; the sentence encoder is nearly all of the rest
    numbers = {
        name: sum(prod(w.shape) for w in published.weights if (w.name in kept) == name) for name in (True, False)
    }
    assert numbers[True] < 0.005 * numbers[False]


def test_a_vocabulary_cut_to_the_tokenizer() -> None:
    config = parse(TINY).with_vocab(45)
    weights = {weight.name: weight for weight in build_mome_weight_map(config, 50, {CHECKPOINT: ()}).weights}
    for name in ("embed_tokens.weight", "decoder.lm_head.weight"):
        assert weights[name].shape == (45, 12)
        (part,) = weights[name].parts
        assert (part.shape, part.used_shape) == ((50, 12), (45, 12))


def test_what_no_graph_reaches_has_a_reason_and_all_else_is_an_error() -> None:
    config = parse(TINY)
    shapes = {part.tensor: part.shape for weight in build(config).weights for part in weight.parts}
    buffers = ("sentence_encoder.pooler.dense.weight", "sentence_encoder.embeddings.position_ids")
    buffers += ("language_model.model.layers.1.self_attn.rotary_emb.inv_freq",)
    full = {**shapes, **dict.fromkeys(buffers, (1,))}
    weight_map = build(config, tuple(full))
    assert set(weight_map.unreachable) == set(buffers)
    check_tensors(weight_map, {CHECKPOINT: full}, {CHECKPOINT: "here"})
    with pytest.raises(MoiieError, match="1 tensor.s. that this model does not have, the first: dino_tower.mask_token"):
        check_tensors(weight_map, {CHECKPOINT: {**full, "dino_tower.mask_token": (1, 16)}}, {CHECKPOINT: "here"})
