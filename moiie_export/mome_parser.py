"""config.json of a MoME (spec mome.md, section 7) -> MomeConfig. What is not implemented is refused by its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moiie_export.config_reader import ConfigReader
from moiie_export.mome_config import (
    AdtConfig,
    DinoConfig,
    EvaConfig,
    MoleConfig,
    MomeConfig,
    Pix2StructConfig,
    SentenceConfig,
    Tower,
    VisionExpert,
)
from moiie_export.mome_published import PUBLISHED
from moiie_export.prompts import MOME
from moiie_export.text_parser import parse_text


def parse_mome(reader: ConfigReader) -> MomeConfig:
    """The model that a config.json describes.

    Args:
        reader: the whole config.json, whose model_type is known to be MoME's.

    Raises:
        MoiieError: a missing or ill-typed key, numbers that do not fit each other, or a value that is not implemented.
    """
    text_reader = reader.section("text_config")
    text_reader.only("model_type", "llama")
    text = parse_text(text_reader, fused=False, window=False)
    move, generation = reader.section("move_config"), reader.section("generation")
    experts = _experts(reader, move)
    grid = _query_grid(move, experts)
    _check_prompt(reader.section("prompt"))
    generation.only("min_length", 1)
    return MomeConfig(
        model_type=reader.text("model_type"),
        text=text,
        moe=None,
        prompt=MOME,
        max_context=text.max_position_embeddings,
        bos_token_id=reader.integer("bos_token_id", minimum=0),  # a prompt cannot begin without it
        eos_token_id=reader.int_list("eos_token_id"),
        pad_token_id=reader.optional_integer("pad_token_id"),
        experts=experts,
        query_grid=grid,
        move_router_hidden=move.integer("router_hidden"),
        mole=_mole(reader.section("mole_config"), text.num_hidden_layers),
        sentence=parse_sentence(reader.section("sentence_encoder_config")),
        num_beams=generation.integer("num_beams"),
        repetition_penalty=generation.number("repetition_penalty"),
        length_penalty=generation.number("length_penalty"),
        # The authors' length counts the start token, ours what is answered (section 3).
        max_new_tokens=generation.integer("max_length_including_bos", minimum=2) - 1,
    )


def _experts(reader: ConfigReader, move: ConfigReader) -> tuple[VisionExpert, ...]:
    """The vision experts in the order of the router's outputs."""
    found: dict[str, VisionExpert] = {}
    for expert in reader.sections("vision_experts"):
        name = expert.text("name")
        parse = _TOWERS.get(name)
        if parse is None or name in found:
            raise expert.error("name", f"each of {', '.join(_TOWERS)} once")
        tower = parse(expert)
        found[name] = VisionExpert(name, tower, _adt(expert, name, tower.hidden_size))
    if len(found) != len(_TOWERS):
        raise reader.error("vision_experts", f"all of {', '.join(_TOWERS)}")
    order = move.get("expert_order")
    if not isinstance(order, list) or len(order) != len(found) or any(name not in order for name in found):
        raise move.error("expert_order", f"each of {', '.join(_TOWERS)} once, in the order of the router's outputs")
    return tuple(found[name] for name in order)


def _clip(reader: ConfigReader) -> EvaConfig:
    reader.only("model_type", "blip_2_vision_model")
    reader.only("hidden_act", "gelu")
    reader.only("qkv_bias", True)
    reader.only("final_norm", False)
    reader.only("keep_cls", True)
    return EvaConfig(
        hidden_size=_width(reader),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.count("num_hidden_layers"),
        num_attention_heads=reader.integer("num_attention_heads"),
        image_size=_image_size(reader),
        patch_size=reader.integer("patch_size"),
        layer_norm_eps=reader.number("layer_norm_eps", 1e-6),
        projector_norm_eps=reader.number("projector_norm_eps"),
    )


def _dino(reader: ConfigReader) -> DinoConfig:
    reader.only("model_type", "dinov2")
    reader.only("hidden_act", "gelu")
    reader.only("qkv_bias", True)
    reader.only("use_swiglu_ffn", False)
    reader.only("num_register_tokens", 0)
    reader.only("pos_interp_offset", 0.1)
    reader.only("final_norm", True)
    reader.only("keep_cls", False)
    width = _width(reader)
    return DinoConfig(
        hidden_size=width,
        intermediate_size=reader.integer("intermediate_size", 4 * width),
        num_hidden_layers=reader.count("num_hidden_layers"),
        num_attention_heads=reader.integer("num_attention_heads"),
        image_size=_image_size(reader),
        patch_size=reader.integer("patch_size"),
        layer_norm_eps=reader.number("layer_norm_eps", 1e-6),
    )


def parse_pix2struct(reader: ConfigReader) -> Pix2StructConfig:
    """The Pix2Struct tower that `reader`'s keys describe; errors as `parse_mome`."""
    reader.only("model_type", "pix2struct_vision_model")
    reader.only("dense_act_fn", "gelu_new")
    reader.only("final_norm", True)
    reader.only("keep_cls", False)
    patch = reader.integer("patch_size")
    reader.only("patch_embed_hidden_size", 3 * patch**2)
    return Pix2StructConfig(
        hidden_size=reader.integer("hidden_size"),
        num_hidden_layers=reader.count("num_hidden_layers"),
        num_attention_heads=reader.integer("num_attention_heads"),
        d_kv=reader.integer("d_kv"),
        d_ff=reader.integer("d_ff"),
        seq_len=reader.integer("seq_len"),
        max_patches=reader.integer("max_patches"),
        patch_size=patch,
        layer_norm_eps=reader.number("layer_norm_eps", 1e-6),
    )


_TOWERS: Mapping[str, Callable[[ConfigReader], Tower]] = {"clip": _clip, "dino": _dino, "pix2struct": parse_pix2struct}


def _width(reader: ConfigReader) -> int:
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    reader.divides("num_attention_heads", heads, "hidden_size", width)
    return width


def _image_size(reader: ConfigReader) -> int:
    size, patch = reader.integer("image_size"), reader.integer("patch_size")
    reader.divides("patch_size", patch, "image_size", size)
    return size


def _adt(expert: ConfigReader, name: str, width: int) -> AdtConfig | None:
    if name == "clip":  # its grid is the query grid already
        expert.only("adt", None)
        return None
    reader = expert.section("adt")
    reader.only("activation", "relu")
    adt = AdtConfig(
        num_layers=reader.count("num_layers"),
        num_heads=reader.integer("num_heads"),
        num_points=reader.integer("num_points"),
        ffn_dim=reader.integer("ffn_dim"),
    )
    reader.divides("num_heads", adt.num_heads, "hidden_size", width)
    return adt


def _query_grid(move: ConfigReader, experts: tuple[VisionExpert, ...]) -> tuple[int, int]:
    move.only("router_type", "softmax_mlp")
    move.only("prepend_clip_cls", True)
    # Both orders load the points as they are stored: it says what a training run meant by them (section 5).
    move.one_of("reference_point_order", ("yx_as_xy", "xy"))
    grid = move.get("query_grid")
    if not isinstance(grid, list) or len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        raise move.error("query_grid", "two integers of at least 1, rows and columns")
    for expert in experts:
        if isinstance(expert.tower, EvaConfig) and grid != [expert.tower.grid] * 2:
            raise move.error("query_grid", f"{[expert.tower.grid] * 2}, the grid of {expert.name}, which has no adt")
    move.only("num_visual_tokens", grid[0] * grid[1] + 1)
    return grid[0], grid[1]


def _mole(reader: ConfigReader, layers: int) -> MoleConfig:
    reader.only("activation", "relu")
    reader.only("learnable_scale", True)
    reader.only("bias", True)
    reader.only("router_input", "sentence")
    reader.only("top_k", 1)
    reader.only("gate_scaling", "one_hot")
    return MoleConfig(
        num_experts=reader.count("num_experts"),
        bottleneck=reader.integer("bottleneck"),
        router_hidden=reader.integer("router_hidden"),
        layers=_mole_layers(reader, layers),
    )


def _mole_layers(reader: ConfigReader, count: int) -> tuple[int, ...]:
    value = reader.get("layers", "all")
    if value == "all":
        return tuple(range(count))
    whole = isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < count for i in value)
    if not whole or len(set(value)) != len(value):
        raise reader.error("layers", f"'all' or a list of layer indices below {count}")
    return tuple(sorted(value))


def parse_sentence(reader: ConfigReader) -> SentenceConfig:
    """The sentence encoder that `reader`'s keys describe; errors as `parse_mome`."""
    reader.only("model_type", "bert")
    reader.only("hidden_act", "gelu")
    reader.only("position_embedding_type", "absolute")
    reader.only("pooling", "mean")
    reader.only("normalize", True)
    sentence = SentenceConfig(
        hidden_size=_width(reader),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.count("num_hidden_layers"),
        num_attention_heads=reader.integer("num_attention_heads"),
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=reader.integer("max_position_embeddings", 512),
        type_vocab_size=reader.integer("type_vocab_size", 2),
        layer_norm_eps=reader.number("layer_norm_eps", 1e-12),
        max_length=reader.integer("max_length", minimum=3),  # [CLS], [SEP] and a word between them
    )
    if sentence.max_length > sentence.max_position_embeddings:
        raise reader.error("max_length", f"at most max_position_embeddings = {sentence.max_position_embeddings}")
    return sentence


def _check_prompt(reader: ConfigReader) -> None:
    for key, implemented in PUBLISHED["prompt"].items():
        reader.only(key, implemented)
