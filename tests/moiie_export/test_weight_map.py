"""Weight maps of published sizes against the totals of the specification, and of all variants against checkpoints."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_export.config import parse_config
from moiie_export.model.vlm import VlmModel
from moiie_export.model_config import ModelConfig
from moiie_export.source import ModelSource
from moiie_export.weight_map import CHECKPOINT, build_weight_map
from moiie_export.weights import WeightMap
from tests.synthetic import write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = "google/siglip-so400m-patch14-384"
TOWER = "model.vision_tower.vision_tower.vision_model."

# Spec 1.4: the sizes of Phi-3-mini-4k-instruct and Meta-Llama-3-8B-Instruct.
PHI3 = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
LLAMA = {
    **PHI3,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
UNUSED_TOWER = 428_225_600 - 397_745_440
"""Parameters of SigLIP behind hidden_states[-2] (spec 9.2)."""

# Spec, end of section 3: parameters in all, S2 projector and whole tower included.
TOTALS = {
    "bunny-phi3": 4_269_365_312,
    "bunny-phi3-moe": 7_893_440_576,
    "bunny-phi3-m": 5_477_324_864,
    "bunny-mm-phi3-moe": 12_725_475_392,
    "bunny-mm-phi3-moe-s": 7_893_538_880,
    "bunny-llama": 8_489_428_032,
    "bunny-llama3-moe": 16_945_407_040,
    "bunny-llama-m": 11_308_000_320,
    "bunny-mm-llama3-moe-s": 16_945_538_112,
}
VARIANTS = [
    *(("phi3", variant) for variant in ("dense", "vanilla", "hard", "routed", "moiie")),
    *(("llama", variant) for variant in ("dense", "vanilla", "hard", "moiie")),
]


def published(model_type: str, *, s2: bool = True, **changes: Any) -> ModelConfig:
    case = "moiie_phi3" if "phi3" in model_type else "moiie_llama3"
    raw = json.loads((GOLDEN / case / "checkpoint" / "config.json").read_text())
    raw |= (PHI3 if "phi3" in model_type else LLAMA) | {"num_vis_experts": 4, "num_lan_experts": 4}
    raw |= {"model_type": model_type, "mm_vision_tower": PUBLISHED, "unfreeze_vision_tower": True}
    raw |= {"use_s2": s2, "mm_hidden_size": 3456 if s2 else 1152}
    return parse_config({**raw, **changes}, None)


def build(config: ModelConfig) -> WeightMap:
    return build_weight_map(config, config.text.vocab_size, {CHECKPOINT: ()})


def elements(weight_map: WeightMap) -> int:
    return sum(prod(weight.shape) for weight in weight_map.weights)


@pytest.mark.parametrize("model_type", TOTALS)
def test_published_sizes_have_the_published_number_of_parameters(model_type: str) -> None:
    weight_map = build(published(model_type))
    assert elements(weight_map) + UNUSED_TOWER == TOTALS[model_type]
    assert sum(prod(part.used_shape) for weight in weight_map.weights for part in weight.parts) == elements(weight_map)


@pytest.mark.parametrize(("model_type", "decoder"), [("bunny-mm-phi3-moe-s", 327), ("bunny-mm-llama3-moe-s", 471)])
def test_published_models_have_the_published_number_of_tensors(model_type: str, decoder: int) -> None:
    """Spec 4.1: 448 tensors of the tower, of which the last layer's 16, two of the norm and eleven of the head are unused."""
    names = [part.tensor for weight in build(published(model_type)).weights for part in weight.parts]
    assert len(names) == len(set(names))
    assert sum(not name.startswith("model.vision_tower.") for name in names) == decoder
    assert sum(name.startswith(TOWER) for name in names) == 448 - 16 - 2 - 11


def test_shapes_of_the_published_checkpoint() -> None:
    """Some rows of spec 4.1, literally."""
    shapes = {
        part.tensor: part.shape for weight in build(published("bunny-mm-phi3-moe-s")).weights for part in weight.parts
    }
    assert shapes["model.layers.1.mlp.gate.weight"] == shapes["model.layers.1.mlp.gate_vis.weight"] == (3, 3072)
    assert shapes["model.layers.31.mlp.experts.3.gate_up_proj.weight"] == (16384, 3072)
    assert shapes["model.layers.30.mlp.down_proj.weight"] == (3072, 8192)
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (9216, 3072)
    assert shapes["model.mm_projector.0.weight"] == (3072, 3456)
    assert shapes[f"{TOWER}embeddings.patch_embedding.weight"] == (1152, 3, 14, 14)
    assert shapes[f"{TOWER}embeddings.position_embedding.weight"] == (729, 1152)
    assert shapes[f"{TOWER}encoder.layers.25.mlp.fc1.weight"] == (4304, 1152)
    llama = {
        part.tensor: part.shape for weight in build(published("bunny-mm-llama3-moe-s")).weights for part in weight.parts
    }
    assert llama["model.layers.7.self_attn.k_proj.weight"] == (1024, 4096)
    assert llama["model.layers.7.mlp.experts.0.up_proj.weight"] == (14336, 4096)


@pytest.mark.parametrize("model_type", TOTALS)
def test_parameters_are_exactly_those_of_the_model(model_type: str) -> None:
    config = published(model_type, num_hidden_layers=3)
    with torch.device("meta"):
        model = VlmModel(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: shape for name, (_, _, shape) in build(config).by_parameter().items()} == expected


def test_views_of_a_stack_follow_each_other_and_skip_dead_experts() -> None:
    config = published("bunny-mm-phi3-moe-s", num_experts=8)
    weight_map = build(config)
    stack = next(item for item in weight_map.weights if item.name == "decoder.layers.1.mlp.experts.gate_up_proj")
    assert stack.shape == (7, 16384, 3072)
    assert len(stack.parts) == 7
    for expert in range(7):
        start, shape = stack.parameters()[f"decoder.layers.1.mlp.experts.{expert}.gate_up_proj"]
        assert (start, shape) == (expert * 16384 * 3072, (16384, 3072))
        assert stack.parts[expert].tensor == f"model.layers.1.mlp.experts.{expert}.gate_up_proj.weight"
    dead = ["model.layers.1.mlp.experts.7.down_proj.weight", "model.layers.31.mlp.experts.7.gate_up_proj.weight"]
    unknown = ["model.layers.2.mlp.experts.7.down_proj.weight", "model.layers.1.mlp.experts.8.down_proj.weight"]
    names = {CHECKPOINT: [*dead, *unknown, "model.layers.0.self_attn.rotary_emb.inv_freq"]}
    unreachable = build_weight_map(config, config.text.vocab_size, names).unreachable
    assert set(unreachable) == {*dead, "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all("dead expert 7" in unreachable[name] for name in dead)


def test_what_stays_float32_is_small() -> None:
    """Norms, biases, gates and positions; every matrix of weight follows the bundle's dtype."""
    config = published("bunny-mm-phi3-moe-s")
    for weight in build(config).weights:
        small = len(weight.shape) == 1 or ".gate" in weight.name.replace("gate_up", "") or "position" in weight.name
        assert weight.keep_float32 is small, weight.name


def test_the_vocabulary_is_cut_to_the_tokenizer() -> None:
    config = published("bunny-mm-phi3-moe-s").with_vocab(32011)
    weights = {item.name: item for item in build_weight_map(config, 32064, {CHECKPOINT: ()}).weights}
    for name in ("embed_tokens.weight", "decoder.lm_head.weight"):
        assert weights[name].shape == (32011, 3072)
        assert (weights[name].parts[0].shape, weights[name].parts[0].rows) == ((32064, 3072), 32011)


@pytest.mark.parametrize(("kind", "tensors"), [("linear", ["weight", "bias"]), ("mlp1x_gelu", ["0.weight", "0.bias"])])
def test_projectors_of_one_layer(kind: str, tensors: list[str]) -> None:
    weight_map = build(published("bunny-phi3", mm_projector_type=kind))
    found = [part.tensor for weight in weight_map.weights for part in weight.parts if "projector" in part.tensor]
    assert found == [f"model.mm_projector.{name}" for name in tensors]


@pytest.mark.parametrize(("backbone", "variant"), VARIANTS)
def test_checkpoints_written_from_the_specification_are_mapped_whole(
    tmp_path: Path, backbone: str, variant: str
) -> None:
    """Opening fails on any missing, unknown or misshapen tensor; what is left over has a reason."""
    directory = write_checkpoint(
        tmp_path / "model", backbone=backbone, variant=variant, layers=3, kv_heads=2, experts=8
    )
    with ModelSource.open(directory) as source:
        used = {
            part.tensor for weight in source.weight_map.weights for part in weight.parts if part.source == CHECKPOINT
        }
        assert used | set(source.weight_map.unreachable) >= set(source.checkpoint.tensors)
        assert used.isdisjoint(source.weight_map.unreachable)
        dead = {name for name in source.weight_map.unreachable if "experts" in name}
        assert all(".experts.7." in name for name in dead)
        assert bool(dead) is (variant == "moiie")


@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_other_expert_layers(tmp_path: Path, layers: Any) -> None:
    with ModelSource.open(
        write_checkpoint(tmp_path / "model", layers=3, moe_layers=layers, unfreeze=True, s2=True)
    ) as source:
        assert source.config.moe is not None
        assert list(source.config.moe.layers) == ([0, 1, 2] if layers == "all" else layers)
