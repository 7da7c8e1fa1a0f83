"""What a checkpoint's config.json says; the table below is the only place that knows model types by name.

A value we do not implement is refused with its key (spec moiie.md, sections 1, 3, 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moiie_export.config_reader import ConfigReader
from moiie_export.model_config import (
    Modality,
    ModelConfig,
    MoeConfig,
    MoiieConfig,
    TextConfig,
    VisionConfig,
    projector_depth,
)
from moiie_export.mome_parser import parse_mome
from moiie_export.prompts import LLAMA3, PHI3, PromptStyle
from moiie_export.text_parser import parse_text
from moiie_runtime.errors import MoiieError


@dataclass(frozen=True)
class _ModelType:
    """How a model type's config.json is read; `separate_tower`: it names a vision tower with its own directory."""

    parse: Callable[[ConfigReader, Mapping[str, Any] | None], ModelConfig]
    separate_tower: bool


def parse_config(raw: Mapping[str, Any], tower: Mapping[str, Any] | None, where: str = "config.json") -> ModelConfig:
    """Read a checkpoint's config.json and its tower's.

    Args:
        raw: the parsed config.json.
        tower: the parsed config.json of the SigLIP directory; None when none was found, which is enough only for
            the published tower with its weights in the checkpoint (spec moiie.md, 4.3), or when there is none.
        where: the file's name for error messages.

    Raises:
        MoiieError: an unknown model type, a missing or ill-typed key, or a value that is not implemented.
    """
    reader = ConfigReader(raw, where)
    return _model_type(reader, where).parse(reader, tower)


def has_separate_tower(raw: Mapping[str, Any], where: str = "config.json") -> bool:
    """Whether a config.json names a vision tower with a directory of its own.

    Raises:
        MoiieError: an unknown model type.
    """
    return _model_type(ConfigReader(raw, where), where).separate_tower


def _model_type(reader: ConfigReader, where: str) -> _ModelType:
    name = reader.text("model_type")
    found = _MODEL_TYPES.get(name)
    if found is None:
        known = ", ".join(sorted(_MODEL_TYPES))
        raise MoiieError(f"{where}: model_type: {name!r} is not a model we know", f"known model types: {known}")
    return found


_Experts = Callable[[ConfigReader, tuple[int, ...]], MoeConfig]


def _bunny(backbone: Callable[[ConfigReader], TextConfig], experts: _Experts | None, prompt: PromptStyle) -> _ModelType:
    """MoIIE and its siblings: a backbone, an arrangement of experts, a conversation template."""

    def parse(reader: ConfigReader, tower: Mapping[str, Any] | None) -> MoiieConfig:
        _refuse_unimplemented(reader)
        text = backbone(reader)
        layers = _moe_layers(reader, text.num_hidden_layers)
        moe = experts(reader, layers) if experts and layers else None
        vision = _vision(reader, tower)
        eos = reader.int_list("eos_token_id")
        return MoiieConfig(
            model_type=reader.text("model_type"),
            text=text,
            vision=vision,
            moe=moe,
            projector=_projector(reader, vision, text.hidden_size),
            image_aspect_ratio="pad" if reader.text("image_aspect_ratio", "square") == "pad" else "square",
            prompt=prompt,
            max_context=min(reader.integer("tokenizer_model_max_length", 4096), text.max_position_embeddings),
            bos_token_id=reader.optional_integer("bos_token_id"),
            eos_token_id=eos,
            pad_token_id=reader.optional_integer("pad_token_id"),
            vision_tower=reader.text("mm_vision_tower"),
            vision_weights_in_checkpoint=reader.boolean("unfreeze_vision_tower", False),
            last_image_token_is_language=reader.boolean("last_image_token_is_language", True),
        )

    return _ModelType(parse, separate_tower=True)


def _refuse_unimplemented(reader: ConfigReader) -> None:
    reader.only("mm_use_im_start_end", False)
    reader.only("mm_use_im_patch_token", False)
    reader.only("mm_vision_tower_aux", None)
    reader.only("mm_patch_merge_type", "flat")
    reader.one_of("image_aspect_ratio", ("pad", "square"))


def _phi3(reader: ConfigReader) -> TextConfig:
    return parse_text(reader, fused=True, window=True)


def _llama(reader: ConfigReader) -> TextConfig:
    return parse_text(reader, fused=False, window=False)


def _moe_layers(reader: ConfigReader, count: int) -> tuple[int, ...]:
    """Odd layers, as the authors hard-code; `moe_layers` ("odd", "all" or a list) overrides it."""
    value = reader.get("moe_layers", "odd")
    if value == "odd":
        return tuple(range(1, count, 2))
    if value == "all":
        return tuple(range(count))
    if (
        isinstance(value, list)
        and all(type(i) is int and 0 <= i < count for i in value)
        and len(set(value)) == len(value)
    ):
        return tuple(sorted(value))
    raise reader.error("moe_layers", f"'odd', 'all' or a list of layer indices below {count}")


def _moiie(reader: ConfigReader, layers: tuple[int, ...]) -> MoeConfig:
    """G = int(E/2 + E/4) experts per modality; a language gate's row g is expert g + offset (spec 1.6)."""
    count = reader.integer("num_experts")
    reach = int(count / 2 + count / 4)
    offset = reader.integer("expert_offset", 1, minimum=0)
    if reach + offset > count:
        raise reader.error(
            "num_experts", f"at least {reach + offset} experts for {reach} language experts from {offset}"
        )
    return _routed(
        reader,
        layers,
        experts=tuple(f"experts.{i}" for i in range(count)),
        groups={"vision": tuple(range(reach)), "language": tuple(range(offset, offset + reach))},
        gates={"vision": "gate_vis", "language": "gate"},
    )


def _vanilla(reader: ConfigReader, layers: tuple[int, ...]) -> MoeConfig:
    every = tuple(range(reader.integer("num_experts")))
    return _routed(
        reader,
        layers,
        experts=tuple(f"experts.{i}" for i in every),
        groups={"vision": every, "language": every},
        gates={"vision": "gate", "language": "gate"},
    )


def _modality_routed(reader: ConfigReader, layers: tuple[int, ...]) -> MoeConfig:
    """Vision experts come first in the global ids, then language experts."""
    vision, language = reader.integer("num_vis_experts"), reader.integer("num_lan_experts")
    return _routed(
        reader,
        layers,
        experts=tuple([f"vis_experts.{i}" for i in range(vision)] + [f"lan_experts.{i}" for i in range(language)]),
        groups={"vision": tuple(range(vision)), "language": tuple(range(vision, vision + language))},
        gates={"vision": "gate_vis", "language": "gate"},
    )


def _modality_hard(reader: ConfigReader, layers: tuple[int, ...]) -> MoeConfig:
    return MoeConfig(
        experts=("vision_expert", "language_expert"),
        top_k=1,
        layers=layers,
        expert_groups={"vision": (0,), "language": (1,)},
        gates={},
    )


def _routed(
    reader: ConfigReader,
    layers: tuple[int, ...],
    *,
    experts: tuple[str, ...],
    groups: dict[Modality, tuple[int, ...]],
    gates: dict[Modality, str],
) -> MoeConfig:
    top_k = reader.integer("num_experts_per_tok")
    for modality, ids in groups.items():
        if top_k > len(ids):
            raise reader.error("num_experts_per_tok", f"at most {len(ids)}, the experts a {modality} token may reach")
    return MoeConfig(experts=experts, top_k=top_k, layers=layers, expert_groups=groups, gates=gates)


PUBLISHED_TOWER: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""SigLIP so400m/14-384, the one tower the authors name (spec 1.1)."""


def _vision(reader: ConfigReader, tower: Mapping[str, Any] | None) -> VisionConfig:
    if tower is None:
        tower = PUBLISHED_TOWER
    if tower.get("model_type") == "siglip":
        vision_half = tower.get("vision_config") or {}
        if not isinstance(vision_half, dict):
            raise ConfigReader(tower, "vision tower config.json").error("vision_config", "an object")
        tower = {"model_type": "siglip_vision_model", **vision_half}
    tower_reader = ConfigReader(tower, "vision tower config.json")
    tower_reader.only("model_type", "siglip_vision_model")
    tower_reader.only("hidden_act", "gelu_pytorch_tanh")
    tower_reader.only("num_channels", 3)
    vision = VisionConfig(
        hidden_size=tower_reader.integer("hidden_size", 768),
        intermediate_size=tower_reader.integer("intermediate_size", 3072),
        num_hidden_layers=tower_reader.integer("num_hidden_layers", 12),
        num_attention_heads=tower_reader.integer("num_attention_heads", 12),
        image_size=tower_reader.integer("image_size", 224),
        patch_size=tower_reader.integer("patch_size", 16),
        layer_norm_eps=tower_reader.number("layer_norm_eps", 1e-6),
        select_layer=reader.integer("mm_vision_select_layer", -2, minimum=None),
    )
    tower_reader.divides("num_attention_heads", vision.num_attention_heads, "hidden_size", vision.hidden_size)
    if not 0 <= vision.layers_used <= vision.num_hidden_layers:
        raise reader.error(
            "mm_vision_select_layer", f"a hidden state of a tower with {vision.num_hidden_layers} layers"
        )
    return replace(vision, scales=_scales(reader, vision.image_size)) if reader.boolean("use_s2", False) else vision


def _scales(reader: ConfigReader, image_size: int) -> tuple[int, ...]:
    """S2 scales ascending; the smallest is the tower's own size, the rest are multiples of it (spec 1.2)."""
    value = reader.get("s2_scales", "384,768,1152")
    try:
        parts = [int(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        parts = None
    if not isinstance(parts, list) or not all(type(part) is int for part in parts):
        raise reader.error("s2_scales", "sizes in pixels, joined by commas or as a list")
    scales = tuple(sorted(set(parts)))
    if len(scales) != len(parts) or scales[:1] != (image_size,) or any(s % image_size for s in scales):
        raise reader.error(
            "s2_scales", f"different multiples of the tower's image size {image_size}, the smallest equal to it"
        )
    return scales


def _projector(reader: ConfigReader, vision: VisionConfig, hidden_size: int) -> str:
    width = reader.integer("mm_hidden_size", vision.feature_size)
    if width != vision.feature_size:
        wanted = f"{vision.feature_size}, what the tower gives with use_s2 {str(bool(vision.scales)).lower()}"
        raise reader.error("mm_hidden_size", wanted)
    kind = reader.text("mm_projector_type", "mlp2x_gelu")
    if kind not in ("identity", "linear") and projector_depth(kind) < 1:
        raise reader.error("mm_projector_type", "'mlpNx_gelu', 'linear' or 'identity' (no other is implemented)")
    if kind == "identity" and width != hidden_size:
        raise reader.error("mm_projector_type", f"layers that take {width} features to hidden_size = {hidden_size}")
    return kind


_MODEL_TYPES: Mapping[str, _ModelType] = {
    "bunny-phi3": _bunny(_phi3, None, PHI3),
    "bunny-phi3-moe": _bunny(_phi3, _vanilla, PHI3),
    "bunny-phi3-m": _bunny(_phi3, _modality_hard, PHI3),
    "bunny-mm-phi3-moe": _bunny(_phi3, _modality_routed, PHI3),
    "bunny-mm-phi3-moe-s": _bunny(_phi3, _moiie, PHI3),
    "bunny-llama": _bunny(_llama, None, LLAMA3),
    "bunny-llama3-moe": _bunny(_llama, _vanilla, LLAMA3),
    "bunny-llama-m": _bunny(_llama, _modality_hard, LLAMA3),
    "bunny-mm-llama3-moe-s": _bunny(_llama, _moiie, LLAMA3),
    "mome": _ModelType(lambda reader, _: parse_mome(reader), separate_tower=False),
}
