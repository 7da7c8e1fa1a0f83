"""The content of bundle.json: everything the runtime needs to know, so that it has no code per model family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiie_export.model_config import MoeConfig
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object

SCHEMA = 1
IMAGE_MARKER, IMAGE_PLACEHOLDER = "<image>", -200
"""How the authors write a picture's place in a prompt, and the id they put there (spec moiie.md, 5.3)."""


def describe_model(source: ModelSource, recipe: Recipe, capacity: int) -> dict[str, Any]:
    """The sections of the manifest that follow from checkpoint and recipe alone."""
    config, text = source.config, source.config.text
    generation = recipe.resolved()["generation"]
    return {
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
            "moe": _moe(config.moe),
        },
        "tokens": {
            "bos": config.bos_token_id,
            "eos": list(config.eos_token_id),
            "pad": config.pad_token_id,
            "image_marker": IMAGE_MARKER,
            "image_placeholder": IMAGE_PLACEHOLDER,
            "image_tokens": config.vision.image_tokens,
        },
        "modality": {"last_image_token_is_language": config.last_image_token_is_language},
        "processor": _processor(source),
        "prompt": {"system": config.prompt.system, "stop_string": config.prompt.stop_string},
        "generation": generation,
        "embed_tokens": {"file": "onnx/weights.safetensors", "tensor": "embed_tokens.weight"},
        "kv_cache": {"layout": "BNSH", "dtype": "float32", "capacity": capacity},
    }


def _moe(moe: MoeConfig | None) -> dict[str, Any] | None:
    if moe is None:
        return None
    return {
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "layers": list(moe.layers),
        "expert_groups": {modality: list(ids) for modality, ids in moe.expert_groups.items()},
        "routed": bool(moe.gates),
    }


def _processor(source: ModelSource) -> dict[str, Any]:
    """The tower's preprocessor_config.json decides; SigLIP's own values where there is none (spec 5.1)."""
    raw: Mapping[str, Any] = {}
    path = None if source.tower_path is None else source.tower_path / "preprocessor_config.json"
    if path is not None and path.is_file():
        raw = read_json_object(path, 1 << 20, "copy the tower's preprocessor_config.json again")
        if raw.get("resample", 3) != 3:
            raise MoiieError(f"{path}: resample: {raw['resample']!r} is not implemented; only 3 (bicubic) is")
    return {
        "image_size": source.config.vision.input_size,
        "aspect_ratio": source.config.image_aspect_ratio,
        "mean": _channels(raw, "image_mean", path),
        "std": _channels(raw, "image_std", path),
        "rescale_factor": float(raw.get("rescale_factor", 1 / 255)),
        "resample": "bicubic",
    }


def _channels(raw: Mapping[str, Any], key: str, path: Path | None) -> list[float]:
    value = raw.get(key, [0.5, 0.5, 0.5])
    if not isinstance(value, list) or len(value) != 3 or any(type(item) not in (int, float) for item in value):
        raise MoiieError(f"{path}: {key}: expected three numbers, found {json.dumps(value)}")
    return [float(item) for item in value]
