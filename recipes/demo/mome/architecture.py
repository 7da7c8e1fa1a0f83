"""The small MoME's config.json (spec mome.md, section 7), and what its vision experts are fed."""

from __future__ import annotations

from typing import Any

from moiie_export.config import parse_config
from moiie_export.families.mome import MEAN, STD
from moiie_export.mome_config import MomeConfig
from moiie_runtime.vision_settings import Encoder, ImageSettings, PatchSettings

WIDTH, TOWER = 128, 64
GRID = 6
"""Queries along one side: four for each of the nine cells that a thing may stand in."""

_BLOCK = {"hidden_size": TOWER, "num_hidden_layers": 2, "num_attention_heads": 4, "layer_norm_eps": 1e-6}
_ADT = {"num_layers": 1, "num_heads": 4, "num_points": 4, "ffn_dim": 128, "activation": "relu"}


def raw_config(vocab_size: int, bos: int, eos: int, sentence_vocab_size: int) -> dict[str, Any]:
    """config.json of the model; clip sees the whole coarsely, dino finer, pix2struct the most pixels."""
    return {
        "model_type": "mome",
        "architectures": ["MoMEForConditionalGeneration"],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "text_config": {
            "model_type": "llama",
            "hidden_size": WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": vocab_size,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 256,
        },
        "vision_experts": _experts(),
        "move_config": {
            "query_grid": [GRID, GRID],
            "router_hidden": 32,
            "router_type": "softmax_mlp",
            "expert_order": ["clip", "dino", "pix2struct"],
            "prepend_clip_cls": True,
            "reference_point_order": "xy",
            "num_visual_tokens": GRID * GRID + 1,
        },
        "mole_config": {
            "num_experts": 4,
            "bottleneck": 16,
            "activation": "relu",
            "learnable_scale": True,
            "bias": True,
            "router_hidden": 24,
            "router_input": "sentence",
            "top_k": 1,
            "gate_scaling": "one_hot",
            "layers": "all",
        },
        "sentence_encoder_config": {
            "model_type": "bert",
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "vocab_size": sentence_vocab_size,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pooling": "mean",
            "normalize": True,
            "max_length": 64,
        },
        "prompt": {"prefix": "USER: <Img>", "suffix": "</Img>", "assistant": " ASSISTANT: ", "add_bos": True},
        "generation": {
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "min_length": 1,
            "max_length_including_bos": 9,
        },
    }


def _experts() -> list[dict[str, Any]]:
    clip = {
        **_BLOCK,
        "name": "clip",
        "model_type": "blip_2_vision_model",
        "intermediate_size": 128,
        "image_size": 72,
        "patch_size": 12,
        "final_norm": False,
        "projector_norm_eps": 1e-5,
        "adt": None,
        "keep_cls": True,
    }
    dino = {
        **_BLOCK,
        "name": "dino",
        "model_type": "dinov2",
        "intermediate_size": 128,
        "image_size": 108,
        "pretrained_image_size": 108,
        "patch_size": 12,
        "pos_interp_offset": 0.1,
        "final_norm": True,
        "keep_cls": False,
        "adt": _ADT,
    }
    pix2struct = {
        **_BLOCK,
        "name": "pix2struct",
        "model_type": "pix2struct_vision_model",
        "d_kv": 16,
        "d_ff": 128,
        "seq_len": 96,
        "max_patches": 85,
        "patch_size": 16,
        "adt": _ADT,
    }
    return [clip, dino, pix2struct]


def model_config(raw: dict[str, Any]) -> MomeConfig:
    """The parsed form of a config.json of this model."""
    config = parse_config(raw, None)
    assert isinstance(config, MomeConfig)
    return config


def encoders(config: MomeConfig) -> tuple[Encoder, ...]:
    """The experts as an exported bundle describes them, so that training feeds them what a bundle does."""
    found = []
    for expert in config.experts:
        tower = expert.tower
        size = getattr(tower, "image_size", None)
        settings: ImageSettings | PatchSettings = (
            PatchSettings(tower.patch_size, getattr(tower, "max_patches", 0), config.query_grid)
            if size is None
            else ImageSettings(size, "square", MEAN, STD, 1 / 255, "bicubic")
        )
        cls = expert.keeps_class_token
        found.append(Encoder(expert.name, expert.component, config.queries + cls, cls=cls, processor=settings))
    return tuple(found)
