"""MoME: vision experts that the instruction weighs, adapters that it chooses (spec mome.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moiie_export.checkpoint_files import CONFIG
from moiie_export.families.family import DECODE, HOST, PREFILL, Family
from moiie_export.mome_config import MomeConfig, Pix2StructConfig, VisionExpert
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_runtime.errors import MoiieError

if TYPE_CHECKING:
    from torch import nn

    from moiie_export.graph.components import Component
    from moiie_export.model.prompts import Look
    from moiie_export.parity.sight import Sight
    from moiie_export.source import ModelSource

SENTENCE_TOKENIZER = "sentence_encoder/tokenizer.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own, for the DINO branch too (spec mome.md, 2)."""


def _expected_users(parameter: str, config: MomeConfig) -> frozenset[str]:
    """Which graphs (or the host) must use a parameter; the host holds the adapters and the embedding table."""
    if parameter.startswith("router."):
        return frozenset({"router"})
    for expert in config.experts:
        if parameter.startswith(f"{expert.component}."):
            return frozenset({expert.component})
    if parameter == "embed_tokens.weight" or parameter.startswith("mole."):
        return frozenset({HOST})
    return frozenset({PREFILL, DECODE})


def _sections(source: ModelSource) -> dict[str, Any]:
    config = _config(source)
    return {
        "vision_experts": [_expert(config, expert) for expert in config.experts],
        "instance_router": {
            "component": "router",
            "tokenizer": SENTENCE_TOKENIZER,
            "max_length": config.sentence.max_length,
        },
        "adapters": {
            "layers": list(config.mole.layers),
            "file": "onnx/weights.safetensors",
            "num_experts": config.mole.num_experts,
        },
        "generation": {
            "num_beams": config.num_beams,
            "repetition_penalty": config.repetition_penalty,
            "length_penalty": config.length_penalty,
            "max_new_tokens": config.max_new_tokens,
            "penalty_prompt": "bos",
        },
    }


def _config(source: ModelSource) -> MomeConfig:
    assert isinstance(source.config, MomeConfig)
    return source.config


def _expert(config: MomeConfig, expert: VisionExpert) -> dict[str, Any]:
    tower = expert.tower
    processor: dict[str, Any]
    if isinstance(tower, Pix2StructConfig):
        processor = {
            "kind": "patches",
            "patch_size": tower.patch_size,
            "max_patches": tower.max_patches,
            "query_grid": list(config.query_grid),
            "positions": tower.seq_len,
        }
    else:
        processor = {
            "kind": "squash",
            "image_size": tower.image_size,
            "mean": list(MEAN),
            "std": list(STD),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        }
    return {
        "name": expert.name,
        "component": expert.component,
        "tokens": config.queries + expert.keeps_class_token,
        "cls": expert.keeps_class_token,
        "processor": processor,
    }


def _text_files(source: ModelSource) -> dict[str, bytes]:
    path = source.checkpoint.path / SENTENCE_TOKENIZER
    if not path.is_file():
        raise MoiieError(
            f"{path}: missing; the router reads the question with the sentence encoder's own tokenizer",
            f"copy it beside {CONFIG}, or write the checkpoint again with `moiie convert`",
        )
    return {SENTENCE_TOKENIZER: path.read_bytes()}


def _model(config: MomeConfig) -> nn.Module:
    from moiie_export.model.mome.model import MomeModel

    return MomeModel(config)


def _components(config: MomeConfig, capacity: int) -> tuple[Component, ...]:
    from moiie_export.graph.mome_components import components

    return components(config, capacity)


def _looks(*parts: Any) -> list[Look]:
    from moiie_export.model.mome.looks import look

    return look(*parts)


def _sight(*parts: Any) -> Sight:
    from moiie_export.parity.mome_sight import MomeSight

    return MomeSight(*parts)


MOME = Family(
    graphs=lambda config: ("router", *(expert.component for expert in config.experts), PREFILL, DECODE),
    weight_map=build_mome_weight_map,
    expected_users=_expected_users,
    sections=_sections,
    text_files=_text_files,
    model=_model,
    components=_components,
    looks=_looks,
    sight=_sight,
)
