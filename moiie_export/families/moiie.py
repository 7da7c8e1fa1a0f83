"""MoIIE and its siblings: one vision encoder, experts reached by modality (spec moiie.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_export.families.family import DECODE, HOST, PREFILL, Family
from moiie_export.model_config import MoeConfig, MoiieConfig
from moiie_export.weight_map import build_weight_map
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object

if TYPE_CHECKING:
    from torch import nn

    from moiie_export.graph.components import Component
    from moiie_export.model.prompts import Look
    from moiie_export.parity.sight import Sight
    from moiie_export.source import ModelSource

_PREPROCESSOR = "preprocessor_config.json"


def _expected_users(parameter: str, config: MoiieConfig) -> frozenset[str]:
    """Which graphs (or the host) must use a parameter of the model.

    Decode tokens are language tokens, so the decode graph holds no vision gate and no expert that only vision reaches
    (spec moiie.md, 9.1).
    """
    if parameter.startswith("vision_encoder."):
        return frozenset({"vision_encoder"})
    if parameter == "embed_tokens.weight":
        return frozenset({HOST})
    if parameter.endswith(".mlp.gate_vis.weight"):
        return frozenset({PREFILL})
    moe, pieces = config.moe, parameter.split(".")
    if moe is not None and "experts" in pieces and int(pieces[-2]) not in moe.expert_groups["language"]:
        return frozenset({PREFILL})
    return frozenset({PREFILL, DECODE})


def _sections(source: ModelSource) -> dict[str, Any]:
    config = _config(source)
    return {
        "model": {"moe": _moe(config.moe)},
        "processor": _processor(source),
    }


def _config(source: ModelSource) -> MoiieConfig:
    assert isinstance(source.config, MoiieConfig)
    return source.config


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
    config = _config(source)
    raw: Mapping[str, Any] = {}
    path = None if source.tower_path is None else source.tower_path / _PREPROCESSOR
    if path is not None and path.is_file():
        raw = read_json_object(path, 1 << 20, "copy the tower's preprocessor_config.json again")
        if raw.get("resample", 3) != 3:
            raise MoiieError(f"{path}: resample: {raw['resample']!r} is not implemented; only 3 (bicubic) is")
    return {
        "image_size": config.vision.input_size,
        "aspect_ratio": config.image_aspect_ratio,
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


def _text_files(source: ModelSource) -> dict[str, bytes]:
    path = None if source.tower_path is None else source.tower_path / _PREPROCESSOR
    return {path.name: path.read_bytes()} if path is not None and path.is_file() else {}


def _model(config: MoiieConfig) -> nn.Module:
    from moiie_export.model.vlm import VlmModel

    return VlmModel(config)


def _components(config: MoiieConfig, capacity: int) -> tuple[Component, ...]:
    from moiie_export.graph.moiie_components import components

    return components(config, capacity)


def _looks(*parts: Any) -> list[Look]:
    from moiie_export.model.looks import look

    return look(*parts)


def _sight(*parts: Any) -> Sight:
    from moiie_export.parity.moiie_sight import MoiieSight

    return MoiieSight(*parts)


MOIIE = Family(
    graphs=lambda _: ("vision_encoder", PREFILL, DECODE),
    weight_map=build_weight_map,
    expected_users=_expected_users,
    sections=_sections,
    text_files=_text_files,
    model=_model,
    components=_components,
    looks=_looks,
    sight=_sight,
)
