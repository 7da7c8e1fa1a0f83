"""Banks: the parts of a model that a quantisation rule can name, and which of them each weight belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

ExpertGroups: TypeAlias = "Mapping[str, tuple[int, ...]]"
EXPERTS = ("vision_experts", "shared_experts", "language_experts")
BANKS: Mapping[str, str] = {
    "vision_experts": "experts that only vision tokens reach",
    "shared_experts": "experts that both modalities reach",
    "language_experts": "experts that only language tokens reach",
    "experts": "all three",
    "dense": "feed-forward layers without experts",
    "attention": "the decoder's attention projections",
    "lm_head": "the output layer",
    "embed_tokens": "the embedding table",
    "vision_tower": "the vision encoders",
    "adt": "the deformable transformation behind a vision encoder",
    "projector": "vision features to the decoder's width",
    "adapters": "the language adapters",
    "gates": "the gates that choose experts",
    "router": "the router that weighs whole encoders and adapters",
    "norms": "scales and shifts of normalisations",
    "biases": "biases",
}
"""Name -> what it holds. `experts` stands for several."""

NEVER = ("gates", "router", "norms", "biases")
"""What is never quantised: it decides or rescales everything else and takes next to no space."""
PLAIN_ONLY = ("embed_tokens", "adapters")
"""What the runtime reads by rows itself: stored as floats only."""

_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(?:gate_up_proj|down_proj)")
_NORM = re.compile(r"(?:.*[._])?(?:layer_?)?norm\d*\.(?:weight|bias)")
_HOST = {"router": "router", "mole": "adapters", "embed_tokens": "embed_tokens"}
_VISION = {"tower": "vision_tower", "adt": "adt", "projector": "projector"}


def bank_of(parameter: str, groups: ExpertGroups | None) -> str:
    """The bank of a model parameter (for a stack of experts: of each expert's own).

    Args:
        parameter: its name.
        groups: modality -> the experts it may reach; None for a model without experts.

    Raises:
        ValueError: no such parameter in any model.
    """
    first, _, rest = parameter.partition(".")
    if first != "router" and parameter.endswith(".bias"):
        return "biases"
    if first != "router" and _NORM.fullmatch(parameter):
        return "norms"
    if first == "decoder":
        return _decoder_bank(parameter, groups)
    kind = _HOST.get(first) or _VISION.get(rest.partition(".")[0])
    if kind is None:
        raise ValueError(f"{parameter}: in no bank")
    return kind


def _decoder_bank(parameter: str, groups: ExpertGroups | None) -> str:
    if parameter.startswith("decoder.lm_head."):
        return "lm_head"
    match = _LAYER.fullmatch(parameter)
    inside = "" if match is None else match[1]
    if inside.startswith("self_attn."):
        return "attention"
    if inside in ("mlp.gate.weight", "mlp.gate_vis.weight"):
        return "gates"
    if inside in ("mlp.gate_up_proj.weight", "mlp.down_proj.weight"):
        return "dense"
    expert = _EXPERT.fullmatch(inside)
    if expert is None or groups is None:
        raise ValueError(f"{parameter}: in no bank")
    return expert_bank(int(expert[1]), groups)


def expert_bank(expert: int, groups: ExpertGroups) -> str:
    """The bank of an expert, from the modalities that may reach it.

    Raises:
        ValueError: none may.
    """
    vision, language = (expert in groups[modality] for modality in ("vision", "language"))
    if not vision and not language:
        raise ValueError(f"expert {expert}: no modality reaches it")
    return EXPERTS[1 if vision and language else 0 if vision else 2]
