"""config.json to ModelConfig: the table of spec 1.6 for every model type, and every value that is not implemented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_export.config import PUBLISHED_TOWER, parse_config
from moiie_export.model_config import ModelConfig, projector_depth
from moiie_runtime.errors import MoiieError

GOLDEN = Path(__file__).parents[1] / "golden"
PHI3 = json.loads((GOLDEN / "moiie_phi3" / "checkpoint" / "config.json").read_text())
LLAMA = json.loads((GOLDEN / "moiie_llama3" / "checkpoint" / "config.json").read_text())
TOWER = json.loads((GOLDEN / "moiie_phi3" / "vision_tower" / "siglip-tiny-patch14-384" / "config.json").read_text())

BASES = {
    "bunny-phi3": PHI3,
    "bunny-phi3-moe": PHI3,
    "bunny-phi3-m": PHI3,
    "bunny-mm-phi3-moe": PHI3,
    "bunny-mm-phi3-moe-s": PHI3,
    "bunny-llama": LLAMA,
    "bunny-llama3-moe": LLAMA,
    "bunny-llama-m": LLAMA,
    "bunny-mm-llama3-moe-s": LLAMA,
}
MOIIE = ("bunny-mm-phi3-moe-s", "bunny-mm-llama3-moe-s")

# Spec 1.6, row by row: E, experts a vision token may reach, experts a language token may reach, dead experts.
GROUPS = [
    (3, (0, 1), (1, 2), ()),
    (4, (0, 1, 2), (1, 2, 3), ()),
    (5, (0, 1, 2), (1, 2, 3), (4,)),
    (6, (0, 1, 2, 3), (1, 2, 3, 4), (5,)),
    (8, tuple(range(6)), tuple(range(1, 7)), (7,)),
    (12, tuple(range(9)), tuple(range(1, 10)), (10, 11)),
    (16, tuple(range(12)), tuple(range(1, 13)), (13, 14, 15)),
]


def parse(model_type: str = "bunny-mm-phi3-moe-s", tower: Any = TOWER, **changes: Any) -> ModelConfig:
    raw = {**BASES[model_type], "model_type": model_type, **changes}
    return parse_config({key: value for key, value in raw.items() if value is not Ellipsis}, tower)


def refused(match: str, **changes: Any) -> MoiieError:
    with pytest.raises(MoiieError, match=match) as caught:
        parse(**changes)
    return caught.value


@pytest.mark.parametrize("model_type", MOIIE)
@pytest.mark.parametrize(("count", "vision", "language", "dead"), GROUPS)
def test_moiie_groups_are_those_of_the_table(
    model_type: str, count: int, vision: tuple[int, ...], language: tuple[int, ...], dead: tuple[int, ...]
) -> None:
    moe = parse(model_type, num_experts=count).moe
    assert moe is not None
    assert moe.expert_groups == {"vision": vision, "language": language}
    assert moe.gates == {"vision": "gate_vis", "language": "gate"}
    assert moe.experts == tuple(f"experts.{i}" for i in range(count))
    assert set(range(count)) - set(moe.reachable) == set(dead)
    assert (moe.num_experts, moe.top_k, moe.layers, moe.one_gate) == (count, 2, (1, 3), False)


@pytest.mark.parametrize("model_type", MOIIE)
@pytest.mark.parametrize(("count", "reach"), [(1, 0), (2, 1)])
def test_one_or_two_experts_are_too_few_for_two_per_token(model_type: str, count: int, reach: int) -> None:
    refused(
        f"num_experts_per_tok: expected at most {reach}, the experts a vision token may reach, found 2",
        model_type=model_type,
        num_experts=count,
    )


def test_two_experts_are_enough_for_one_per_token() -> None:
    moe = parse(num_experts=2, num_experts_per_tok=1).moe
    assert moe is not None
    assert moe.expert_groups == {"vision": (0,), "language": (1,)}


def test_expert_offset_moves_the_language_experts() -> None:
    moe = parse(num_experts=8, expert_offset=2).moe
    assert moe is not None
    assert moe.expert_groups == {"vision": (0, 1, 2, 3, 4, 5), "language": (2, 3, 4, 5, 6, 7)}
    assert moe.reachable == tuple(range(8))
    together = parse(num_experts=8, expert_offset=0).moe
    assert together is not None
    assert together.expert_groups["language"] == together.expert_groups["vision"]
    refused(
        "num_experts: expected at least 9 experts for 6 language experts from 3, found 8",
        num_experts=8,
        expert_offset=3,
    )
    refused("expert_offset: expected an integer of at least 0", expert_offset=-1)


@pytest.mark.parametrize("model_type", ["bunny-phi3-moe", "bunny-llama3-moe"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_vanilla_experts_share_one_gate(model_type: str, count: int) -> None:
    moe = parse(model_type, num_experts=count).moe
    assert moe is not None
    assert moe.expert_groups == {"vision": tuple(range(count)), "language": tuple(range(count))}
    assert moe.gates == {"vision": "gate", "language": "gate"}
    assert moe.one_gate
    assert moe.experts == tuple(f"experts.{i}" for i in range(count))


def test_modality_routed_experts_keep_apart_vision_first() -> None:
    moe = parse("bunny-mm-phi3-moe", num_vis_experts=3, num_lan_experts=5).moe
    assert moe is not None
    assert moe.expert_groups == {"vision": (0, 1, 2), "language": (3, 4, 5, 6, 7)}
    assert moe.experts == (*(f"vis_experts.{i}" for i in range(3)), *(f"lan_experts.{i}" for i in range(5)))
    assert moe.gates == {"vision": "gate_vis", "language": "gate"}
    counts = {"num_vis_experts": 3, "num_lan_experts": 2, "num_experts_per_tok": 3}
    refused("at most 2, the experts a language token may reach", model_type="bunny-mm-phi3-moe", **counts)


@pytest.mark.parametrize("model_type", ["bunny-phi3-m", "bunny-llama-m"])
def test_the_hard_split_has_no_router(model_type: str) -> None:
    moe = parse(model_type).moe
    assert moe is not None
    assert moe.expert_groups == {"vision": (0,), "language": (1,)}
    assert (moe.experts, moe.top_k, moe.gates, moe.one_gate) == (("vision_expert", "language_expert"), 1, {}, False)


@pytest.mark.parametrize("model_type", ["bunny-phi3", "bunny-llama"])
def test_dense_models_have_no_experts(model_type: str) -> None:
    assert parse(model_type).moe is None


@pytest.mark.parametrize("model_type", BASES)
def test_backbones(model_type: str) -> None:
    config = parse(model_type, num_vis_experts=4, num_lan_experts=4, sliding_window=2047)
    phi3 = "phi3" in model_type
    assert config.text.fused_projections is phi3
    assert (config.text.sliding_window, config.text.visible_keys) == ((2047, 2048) if phi3 else (None, None))
    assert config.prompt.stop_is_forced is not phi3
    assert config.text.rope_theta == (10000.0 if phi3 else 500000.0)
    assert config.text.head_dim == 8
    assert config.max_context == 4096
    assert config.last_image_token_is_language


@pytest.mark.parametrize(
    ("value", "layers"), [(None, (1, 3)), ("odd", (1, 3)), ("all", (0, 1, 2, 3)), ([3, 0], (0, 3)), ([2], (2,))]
)
def test_layers_with_experts(value: Any, layers: tuple[int, ...]) -> None:
    moe = parse(moe_layers=value).moe
    assert moe is not None
    assert moe.layers == layers


@pytest.mark.parametrize("value", ["even", [4], [-1], [1, 1], [True], [1.0], 1, {"1": 1}])
def test_other_layers_are_refused(value: Any) -> None:
    refused("moe_layers: expected 'odd', 'all' or a list of layer indices below 4", moe_layers=value)


def test_a_stack_without_expert_layers_is_dense() -> None:
    assert parse(moe_layers=[]).moe is None
    assert parse(num_hidden_layers=1).moe is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "su"}),
        ("rope_scaling", {}),
        ("rope_parameters", {"rope_type": "longrope"}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("tie_word_embeddings", True),
        ("partial_rotary_factor", 0.5),
        ("head_dim", 16),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("mm_vision_tower_aux", "facebook/dinov2"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("quantization_config", {"bits": 4}),
        ("image_aspect_ratio", "anyres"),
    ],
)
def test_values_that_are_not_implemented_are_refused_by_key_and_value(key: str, value: Any) -> None:
    error = refused(f"config.json: {key}: ", **{key: value})
    assert repr(value) in error.message
    assert "not implemented" in error.message


@pytest.mark.parametrize(
    "kind", ["spp_v1", "ldp", "vanilla", "minigpt", "mlp2x_relu", "mlp0x_gelu", "mlpx_gelu", "mlp-1x_gelu"]
)
def test_projectors_that_change_the_token_count_are_refused(kind: str) -> None:
    error = refused("mm_projector_type: expected 'mlpNx_gelu', 'linear' or 'identity'", mm_projector_type=kind)
    assert kind in error.message
    assert projector_depth(kind) == 0


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projector_depths(kind: str, depth: int) -> None:
    assert parse(mm_projector_type=kind).projector_layers == depth
    assert parse(mm_projector_type=...).projector == "mlp2x_gelu"


def test_no_projector_needs_a_tower_as_wide_as_the_decoder() -> None:
    wide = {**TOWER, "hidden_size": 32}
    assert parse(tower=wide, mm_hidden_size=32, mm_projector_type="identity").projector_layers == 0
    refused("expected layers that take 16 features to hidden_size = 32, found 'identity'", mm_projector_type="identity")


def test_scales() -> None:
    assert parse().vision.scales == ()
    for value in (..., None, "384,768,1152", "1152, 768, 384", [768, 384, 1152]):
        vision = parse(use_s2=True, mm_hidden_size=48, s2_scales=value).vision
        assert vision.scales == (384, 768, 1152)
        assert (vision.input_size, vision.feature_size, vision.image_tokens) == (1152, 48, 729)
    assert parse(use_s2=True, mm_hidden_size=32, s2_scales="384,768").vision.input_size == 768


@pytest.mark.parametrize(
    "value", ["768,1152", "384,700", "384,384", "384,-384", "384,0", "", "a", [384.5, 768], [True], {"384": 1}, 384, []]
)
def test_scales_that_are_no_pyramid_of_the_tower_are_refused(value: Any) -> None:
    refused("config.json: s2_scales: expected ", use_s2=True, mm_hidden_size=48, s2_scales=value)


def test_the_projector_must_be_as_wide_as_the_scales_together() -> None:
    refused("mm_hidden_size: expected 48, what the tower gives with use_s2 true, found 16", use_s2=True)
    refused("mm_hidden_size: expected 16, what the tower gives with use_s2 false, found 48", mm_hidden_size=48)
    assert parse(mm_hidden_size=...).vision.feature_size == 16


@pytest.mark.parametrize(("select", "used"), [(-2, 2), (-1, 3), (2, 2), (0, 0), (-4, 0), (None, 2)])
def test_the_selected_hidden_state_counts_the_embeddings(select: int | None, used: int) -> None:
    assert parse(mm_vision_select_layer=select).vision.layers_used == used


@pytest.mark.parametrize("select", [-5, 4])
def test_a_hidden_state_that_the_tower_lacks_is_refused(select: int) -> None:
    refused("mm_vision_select_layer: expected a hidden state of a tower with 3 layers", mm_vision_select_layer=select)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 34}, "hidden_size = 34 is not a multiple of num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"hidden_size": 36}, "hidden_size / num_attention_heads = 9 is not a multiple of 2"),
    ],
)
def test_head_sizes_that_do_not_divide_are_refused(changes: dict[str, int], message: str) -> None:
    refused(message, **changes)


def test_unknown_model_types_are_refused_with_the_known_ones() -> None:
    with pytest.raises(MoiieError, match="model_type: 'llava' is not a model we know") as caught:
        parse_config({**PHI3, "model_type": "llava"}, TOWER)
    assert all(name in str(caught.value.hint) for name in BASES)
    with pytest.raises(MoiieError, match="model_type: expected a string"):
        parse_config({**PHI3, "model_type": ["bunny-phi3"]}, TOWER)


@pytest.mark.parametrize(
    "changes",
    [
        {"router_jitter_noise": ...},
        {"router_jitter_noise": 0.1},
        {"output_vis_router_logits": True, "output_lan_router_logits": True},
        {"output_vis_router_logits": ..., "output_lan_router_logits": ...},
        {"sliding_window": None},
        {"use_s2": None, "unfreeze_vision_tower": ..., "mm_patch_merge_type": "flat"},
        {"some_future_key": {"nested": [1, 2]}, "num_local_experts": 99},
        {"rope_scaling": ..., "hidden_act": ..., "num_key_value_heads": None, "head_dim": 8},
        {"moe_enable": True, "tune_mm_mlp_adapter": True, "use_cache": False, "torch_dtype": "bfloat16"},
    ],
)
def test_quirks_of_real_checkpoints_are_accepted(changes: dict[str, Any]) -> None:
    changed, plain = parse(**changes), parse()
    if "sliding_window" in changes:
        assert changed.text.visible_keys is None
        return
    assert changed == plain


def test_end_tokens_are_one_id_or_several() -> None:
    assert parse(eos_token_id=3).eos_token_id == (3,)
    assert parse(eos_token_id=[3, 5]).eos_token_id == (3, 5)
    assert parse(eos_token_id=None).eos_token_id == ()


def test_context_is_the_shorter_of_positions_and_the_authors_cut() -> None:
    assert parse(tokenizer_model_max_length=1000).max_context == 1000
    assert parse(max_position_embeddings=900).max_context == 900
    assert parse(tokenizer_model_max_length=...).max_context == 4096


def test_without_a_tower_the_published_one_is_meant() -> None:
    vision = parse(tower=None, mm_hidden_size=1152, mm_vision_tower="google/siglip-so400m-patch14-384").vision
    assert (vision.hidden_size, vision.intermediate_size, vision.num_attention_heads) == (1152, 4304, 16)
    assert (vision.layers_used, vision.grid, vision.image_tokens, vision.layer_norm_eps) == (26, 27, 729, 1e-6)
    assert parse(tower=PUBLISHED_TOWER, mm_hidden_size=...).vision == vision


def test_a_whole_siglip_is_read_by_its_vision_half() -> None:
    whole = {"model_type": "siglip", "text_config": {"hidden_size": 7}, "vision_config": {**TOWER, "model_type": None}}
    assert parse(tower=whole).vision == parse().vision
    with pytest.raises(MoiieError, match="vision tower config.json: vision_config: expected an object, found 5"):
        parse(tower={"model_type": "siglip", "vision_config": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip_vision_model"}, "model_type: 'clip_vision_model' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not implemented"),
        ({"num_channels": 1}, "num_channels: 1 is not implemented"),
        ({"image_size": "384"}, "image_size: expected an integer"),
        ({"num_attention_heads": 3}, "hidden_size = 16 is not a multiple of num_attention_heads = 3"),
    ],
)
def test_other_towers_are_refused(changes: dict[str, Any], message: str) -> None:
    refused(f"vision tower config.json: {message}", tower={**TOWER, **changes})
