"""config.json of a MoME: the published one, every refused value by its key, and numbers that do not fit each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiie_export.config_reader import ConfigReader
from moiie_export.mome_config import AdtConfig, DinoConfig, EvaConfig, MomeConfig, Pix2StructConfig
from moiie_export.mome_parser import parse_mome
from moiie_export.mome_published import PUBLISHED
from moiie_runtime.errors import MoiieError

CLIP, DINO, PIX2STRUCT = 0, 1, 2


def parse(*changes: tuple[tuple[str | int, ...], Any]) -> MomeConfig:
    """The published config with values changed; each change is (path, value)."""
    raw = copy.deepcopy(dict(PUBLISHED))
    for path, value in changes:
        inner: Any = raw
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    return parse_mome(ConfigReader(raw, "config.json"))


def paths(value: Any, above: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where every value of a JSON document is, objects and lists included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in inner for path in [(*above, key), *paths(each, (*above, key))]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 2000) | st.just(10**400) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(path=st.sampled_from(paths(PUBLISHED)), value=JSON)
def test_any_value_of_any_key_is_read_or_refused(path: tuple[str | int, ...], value: Any) -> None:
    try:
        assert isinstance(parse((path, value)), MomeConfig)
    except MoiieError as error:
        assert error.message.startswith("config.json: ")


def test_the_precision_of_rotary_tables_is_a_field() -> None:
    assert parse().text.rotary_table == "bfloat16"
    assert parse((("text_config", "rotary_table"), None)).text.rotary_table == "float32"
    with pytest.raises(
        MoiieError, match="text_config: rotary_table: 'float16' is not implemented; known: float32, bfloat16"
    ):
        parse((("text_config", "rotary_table"), "float16"))


def test_the_published_model() -> None:
    config = parse()
    assert [expert.name for expert in config.experts] == ["clip", "dino", "pix2struct"]
    assert [type(expert.tower) for expert in config.experts] == [EvaConfig, DinoConfig, Pix2StructConfig]
    assert [expert.adt for expert in config.experts] == [None, AdtConfig(6, 8, 4, 1024), AdtConfig(6, 8, 4, 1024)]
    assert (config.query_grid, config.queries, config.image_tokens) == ((16, 16), 256, 257)
    assert config.experts[DINO].tower.grid == 32  # type: ignore[union-attr]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2,), 0)
    assert (config.text.num_key_value_heads, config.text.head_dim, config.text.rope_theta) == (32, 128, 1e4)
    assert config.mole.layers == tuple(range(32))
    assert config.max_context == 4096
    # the authors' max_length 256 counts the start token
    assert (config.num_beams, config.repetition_penalty, config.length_penalty, config.max_new_tokens) == (
        5,
        1.5,
        1,
        255,
    )
    assert config.moe is None


def test_experts_are_in_the_order_of_the_router() -> None:
    config = parse((("move_config", "expert_order"), ["pix2struct", "clip", "dino"]))
    assert [expert.name for expert in config.experts] == ["pix2struct", "clip", "dino"]
    assert isinstance(config.experts[0].tower, Pix2StructConfig)


def test_adapters_in_some_layers_only() -> None:
    assert parse((("mole_config", "layers"), [31, 0, 5])).mole.layers == (0, 5, 31)


def test_both_orders_of_reference_points_are_the_same_model() -> None:
    assert parse((("move_config", "reference_point_order"), "xy")) == parse()


def test_widths_of_feed_forwards_have_defaults() -> None:
    assert parse((("vision_experts", DINO, "intermediate_size"), None)) == parse()
    assert parse((("text_config", "num_key_value_heads"), None)) == parse()


NOT_IMPLEMENTED = [
    (("text_config", "model_type"), "mistral", "text_config: model_type"),
    (("text_config", "rope_scaling"), {"type": "linear", "factor": 4.0}, "text_config: rope_scaling"),
    (("text_config", "tie_word_embeddings"), True, "text_config: tie_word_embeddings"),
    (("vision_experts", CLIP, "model_type"), "clip_vision_model", r"vision_experts\[0\]: model_type"),
    (("vision_experts", CLIP, "adt"), {"num_layers": 6}, r"vision_experts\[0\]: adt"),
    (("vision_experts", CLIP, "final_norm"), True, r"vision_experts\[0\]: final_norm"),
    (("vision_experts", CLIP, "keep_cls"), False, r"vision_experts\[0\]: keep_cls"),
    (("vision_experts", CLIP, "qkv_bias"), False, r"vision_experts\[0\]: qkv_bias"),
    (("vision_experts", DINO, "final_norm"), False, r"vision_experts\[1\]: final_norm"),
    (("vision_experts", DINO, "keep_cls"), True, r"vision_experts\[1\]: keep_cls"),
    (("vision_experts", DINO, "use_swiglu_ffn"), True, r"vision_experts\[1\]: use_swiglu_ffn"),
    (("vision_experts", DINO, "num_register_tokens"), 4, r"vision_experts\[1\]: num_register_tokens"),
    (("vision_experts", DINO, "pos_interp_offset"), 0.0, r"vision_experts\[1\]: pos_interp_offset"),
    (("vision_experts", DINO, "adt", "activation"), "gelu", r"vision_experts\[1\]: adt: activation"),
    (("vision_experts", PIX2STRUCT, "dense_act_fn"), "relu", r"vision_experts\[2\]: dense_act_fn"),
    (("vision_experts", PIX2STRUCT, "patch_embed_hidden_size"), 512, r"vision_experts\[2\]: patch_embed_hidden_size"),
    (("move_config", "router_type"), "add", "move_config: router_type"),
    (("move_config", "prepend_clip_cls"), False, "move_config: prepend_clip_cls"),
    (("move_config", "reference_point_order"), "yx", "move_config: reference_point_order"),
    (("move_config", "num_visual_tokens"), 256, "move_config: num_visual_tokens"),
    (("mole_config", "activation"), "gelu", "mole_config: activation"),
    (("mole_config", "learnable_scale"), False, "mole_config: learnable_scale"),
    (("mole_config", "bias"), False, "mole_config: bias"),
    (("mole_config", "router_input"), "instruction+text", "mole_config: router_input"),
    (("mole_config", "top_k"), 2, "mole_config: top_k"),
    (("mole_config", "gate_scaling"), "softmax", "mole_config: gate_scaling"),
    (("sentence_encoder_config", "model_type"), "mpnet", "sentence_encoder_config: model_type"),
    (("sentence_encoder_config", "pooling"), "cls", "sentence_encoder_config: pooling"),
    (("sentence_encoder_config", "normalize"), False, "sentence_encoder_config: normalize"),
    (("prompt", "prefix"), "User: <Img>", "prompt: prefix"),
    (("prompt", "assistant"), " ASSISTANT:", "prompt: assistant"),
    (("prompt", "add_bos"), False, "prompt: add_bos"),
    (("generation", "min_length"), 5, "generation: min_length"),
]


@pytest.mark.parametrize(("path", "value", "key"), NOT_IMPLEMENTED)
def test_what_is_not_implemented_is_refused_by_its_key(path: tuple[str | int, ...], value: Any, key: str) -> None:
    with pytest.raises(MoiieError, match=rf"^config\.json: {key}: .* is not implemented"):
        parse((path, value))


WRONG = [
    (("bos_token_id",), None, "bos_token_id: missing"),
    (("text_config",), [], "text_config: expected an object"),
    (("text_config", "hidden_size"), "4096", "text_config: hidden_size: expected an integer"),
    (("vision_experts",), {}, "vision_experts: expected a list of objects"),
    (("vision_experts",), [], "vision_experts: expected a list of objects"),
    (("vision_experts", DINO), "dinov2", "vision_experts: expected a list of objects"),
    (
        ("vision_experts", DINO, "name"),
        "clip",
        r"vision_experts\[1\]: name: expected each of clip, dino, pix2struct once",
    ),
    (("vision_experts", DINO, "name"), "sam", r"vision_experts\[1\]: name: expected each of"),
    (("vision_experts", DINO, "adt"), None, r"vision_experts\[1\]: adt: missing"),
    (("vision_experts", DINO, "adt"), 6, r"vision_experts\[1\]: adt: expected an object"),
    (("vision_experts", DINO, "adt", "num_heads"), 7, r"hidden_size = 1024 is not a multiple of num_heads = 7"),
    (
        ("vision_experts", DINO, "num_attention_heads"),
        3,
        r"hidden_size = 1024 is not a multiple of num_attention_heads",
    ),
    (("vision_experts", DINO, "image_size"), 450, r"image_size = 450 is not a multiple of patch_size = 14"),
    (("vision_experts", CLIP, "image_size"), 28, r"query_grid: expected \[2, 2\], the grid of clip"),
    (("vision_experts", CLIP, "projector_norm_eps"), None, r"vision_experts\[0\]: projector_norm_eps: missing"),
    (("vision_experts", PIX2STRUCT, "d_kv"), 0, r"vision_experts\[2\]: d_kv: expected an integer of at least 1"),
    (("move_config", "expert_order"), ["clip", "dino"], "move_config: expert_order: expected each of"),
    (("move_config", "expert_order"), ["clip", "dino", "dino"], "move_config: expert_order: expected each of"),
    (("move_config", "query_grid"), [16], "move_config: query_grid: expected two integers"),
    (("move_config", "query_grid"), [16, 8], r"move_config: query_grid: expected \[16, 16\]"),
    (("mole_config", "layers"), "odd", "mole_config: layers: expected 'all' or a list"),
    (("mole_config", "layers"), [], "mole_config: layers: expected 'all' or a list"),
    (("mole_config", "layers"), [32], "mole_config: layers: expected 'all' or a list of layer indices below 32"),
    (("mole_config", "layers"), [1, 1], "mole_config: layers: expected"),
    (("sentence_encoder_config", "max_length"), 513, "max_length: expected at most max_position_embeddings = 512"),
    (("sentence_encoder_config", "max_length"), 2, "max_length: expected an integer of at least 3"),
    (("text_config", "num_hidden_layers"), 10**9, "num_hidden_layers: expected an integer of at most 10000"),
    (("vision_experts", DINO, "adt", "num_layers"), 10**9, "num_layers: expected an integer of at most 10000"),
    (("mole_config", "num_experts"), 10**9, "num_experts: expected an integer of at most 10000"),
    (("generation", "num_beams"), 0, "generation: num_beams: expected an integer of at least 1"),
    (("generation", "repetition_penalty"), 0, "generation: repetition_penalty: expected a positive number"),
    (("generation", "max_length_including_bos"), 1, "max_length_including_bos: expected an integer of at least 2"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_wrong_values_are_named(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(MoiieError, match=message):
        parse((path, value))


@pytest.mark.parametrize("section", [key for key, value in PUBLISHED.items() if isinstance(value, dict)])
def test_every_section_is_needed(section: str) -> None:
    with pytest.raises(MoiieError, match=rf"^config\.json: {section}: missing"):
        parse(((section,), None))


def test_all_three_experts_are_needed() -> None:
    with pytest.raises(MoiieError, match="vision_experts: expected all of clip, dino, pix2struct"):
        parse((("vision_experts",), PUBLISHED["vision_experts"][:2]))
