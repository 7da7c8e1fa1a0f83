"""The demo model's config.json and its tower's, in the authors' keys (spec moiie.md, 4.4)."""

from __future__ import annotations

from typing import Any

from moiie_export.config import parse_config
from moiie_export.model_config import ModelConfig

TOWER_NAME = "siglip-demo-patch12-72"

TOWER: dict[str, Any] = {
    "architectures": ["SiglipVisionModel"],
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_channels": 3,
    "image_size": 72,
    "patch_size": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": False,
}
"""A SigLIP tower for 72 pixels: 36 patches of 12 pixels. As in the original, its last layer is never reached."""

PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 72, "width": 72},
}


def dense_config(vocab_size: int, bos: int, eos: int) -> dict[str, Any]:
    """config.json of the dense model before upcycling."""
    return {
        "architectures": ["BunnyLlamaForCausalLM"],
        "model_type": "bunny-llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": 128,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "max_position_embeddings": 512,
        "mm_hidden_size": 48,
        "mm_projector_type": "linear",
        "mm_use_im_start_end": False,
        "mm_vision_tower": TOWER_NAME,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 512,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "unfreeze_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_s2": False,
        "vocab_size": vocab_size,
    }


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """The parsed form of a config.json of this model, dense or sparse."""
    return parse_config(raw, TOWER)
