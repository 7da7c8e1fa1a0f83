"""The content of bundle.json: everything the runtime needs to know, so that it has no code per model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiie_export.families import family_of
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource

SCHEMA = 1
IMAGE_MARKER, IMAGE_PLACEHOLDER = "<image>", -200
"""How the authors write a picture's place in a prompt, and the id they put there (spec moiie.md, 5.3)."""

_PLAIN = {"max_new_tokens": 256, "num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
"""Generation where neither recipe nor checkpoint says anything."""


def describe_model(source: ModelSource, recipe: Recipe, capacity: int) -> dict[str, Any]:
    """The sections of the manifest that follow from checkpoint and recipe alone."""
    config, text = source.config, source.config.text
    common = {
        "schema": SCHEMA,
        "name": source.checkpoint.path.resolve().name if recipe.name == "default" else recipe.name,
        "recipe": recipe.resolved(),
        "dtype": recipe.export.dtype,
        "model": {
            "model_type": config.model_type,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab_size,
            "sliding_window": text.sliding_window,
            "moe": None,
        },
        "tokens": {
            "bos": config.bos_token_id,
            "eos": list(config.eos_token_id),
            "pad": config.pad_token_id,
            "image_marker": IMAGE_MARKER,
            "image_placeholder": IMAGE_PLACEHOLDER,
            "image_tokens": config.image_tokens,
        },
        "modality": {"last_image_token_is_language": config.last_image_token_is_language},
        "prompt": {
            "system": config.prompt.system,
            "stop_string": config.prompt.stop_string,
            "separator": config.prompt.separator,
        },
        "generation": dict(_PLAIN),
        "embed_tokens": {"file": "onnx/weights.safetensors", "tensor": "embed_tokens.weight"},
        "kv_cache": {"layout": "BNSH", "dtype": "float32", "capacity": capacity},
    }
    described = _merged(common, family_of(config).sections(source))
    wanted = recipe.resolved()["generation"]
    described["generation"] |= {key: value for key, value in wanted.items() if value is not None}
    return described


def _merged(common: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The common sections with a family's own entries added, section by section."""
    for name, value in own.items():
        common[name] = {**common.get(name, {}), **value} if isinstance(value, dict) else value
    return common
