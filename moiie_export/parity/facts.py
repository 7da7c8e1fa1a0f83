"""What the manifest says about the model, its tokens and its pictures, against the checkpoint's own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiie_export.bundle_manifest import IMAGE_MARKER, IMAGE_PLACEHOLDER
from moiie_export.model_config import ModelConfig, MoiieConfig
from moiie_export.mome_config import MomeConfig
from moiie_export.parity.mome_facts import mome_facts
from moiie_export.parity.report import Check, tell
from moiie_export.source import ModelSource
from moiie_runtime.bundle import Bundle
from moiie_runtime.strict_files import read_json_object


def check_manifest(bundle: Bundle, source: ModelSource) -> list[Check]:
    """One check a section of the manifest; the note names the first key that differs.

    Where a wrong value changes the arithmetic from some layer on, the check names that layer.
    """
    expected = _expected(source)
    checks = []
    for section, facts in expected.items():
        wrong = [key for key, value in facts.items() if _lookup(bundle.raw, key) != value]
        notes = [f"{key} is {_lookup(bundle.raw, key)!r}, expected {facts[key]!r}" for key in wrong]
        layers = [layer for key in wrong if (layer := _layer(source.config, key)) is not None]
        checks.append(tell("manifest", notes, where=section, layer=min(layers, default=None)))
    template = bundle.read_text("chat_template.jinja") != source.config.prompt.template
    checks.append(tell("manifest", ["chat_template.jinja is not the family's"] * template, where="chat template"))
    return checks


def _expected(source: ModelSource) -> dict[str, dict[str, Any]]:
    """Section -> dotted key in bundle.json -> value."""
    config = source.config
    text = config.text
    return {
        "model": {
            "model.model_type": config.model_type,
            "model.hidden_size": text.hidden_size,
            "model.num_hidden_layers": text.num_hidden_layers,
            "model.num_attention_heads": text.num_attention_heads,
            "model.num_key_value_heads": text.num_key_value_heads,
            "model.head_dim": text.head_dim,
            "model.vocab_size": text.vocab_size,
            "model.sliding_window": text.sliding_window,
        },
        "experts": _experts(config),
        "tokens": {
            "tokens.bos": config.bos_token_id,
            "tokens.eos": list(config.eos_token_id),
            "tokens.pad": config.pad_token_id,
            "tokens.image_marker": IMAGE_MARKER,
            "tokens.image_placeholder": IMAGE_PLACEHOLDER,
            "tokens.image_tokens": config.image_tokens,
        },
        "modality": {"modality.last_image_token_is_language": config.last_image_token_is_language},
        **_own_sections(source),
        "prompt": {"prompt.system": config.prompt.system, "prompt.stop_string": config.prompt.stop_string},
    }


def _experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"model.moe": None}
    return {
        "model.moe.num_experts": moe.num_experts,
        "model.moe.top_k": moe.top_k,
        "model.moe.layers": list(moe.layers),
        "model.moe.routed": bool(moe.gates),
        **{f"model.moe.expert_groups.{modality}": list(ids) for modality, ids in moe.expert_groups.items()},
    }


def _own_sections(source: ModelSource) -> dict[str, dict[str, Any]]:
    """What only some families state."""
    config = source.config
    if isinstance(config, MoiieConfig):
        return {"processor": _processor(source, config)}
    return mome_facts(config) if isinstance(config, MomeConfig) else {}


def _processor(source: ModelSource, config: MoiieConfig) -> dict[str, Any]:
    """The tower's preprocessor_config.json decides; SigLIP's own values where there is none (spec 5.1)."""
    raw: Mapping[str, Any] = {}
    path = None if source.tower_path is None else source.tower_path / "preprocessor_config.json"
    if path is not None and path.is_file():
        raw = read_json_object(path, 1 << 20, "copy the tower's preprocessor_config.json again")
    return {
        "processor.image_size": config.vision.input_size,
        "processor.aspect_ratio": config.image_aspect_ratio,
        "processor.mean": raw.get("image_mean", [0.5] * 3),
        "processor.std": raw.get("image_std", [0.5] * 3),
        "processor.rescale_factor": raw.get("rescale_factor", 1 / 255),
    }


def _layer(config: ModelConfig, key: str) -> int | None:
    """The first decoder layer that a wrong value of `key` changes."""
    moe = config.moe
    if key == "model.sliding_window":
        return 0
    if moe is not None and (key.startswith(("model.moe.expert_groups", "modality.")) or key == "model.moe.top_k"):
        return moe.layers[0]
    return None


def _lookup(raw: Mapping[str, Any], key: str) -> Any:
    value: Any = raw
    for part in key.split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
