"""The config.json side of upcycling: which checkpoints can become MoIIE, and what their config says afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moiie_export.config_reader import ConfigReader
from moiie_runtime.errors import MoiieError

_PHI3_DEFAULTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "sliding_window": None}
_LLAMA_DEFAULTS = {"attention_bias": False, "pretraining_tp": 1}
_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}


@dataclass(frozen=True)
class _Backbone:
    model_type: str
    architecture: str
    mlp_leaves: tuple[str, ...]
    defaults: Mapping[str, Any]
    dense: tuple[str, ...]


_BACKBONES = (
    _Backbone(
        "bunny-mm-phi3-moe-s",
        "BunnyMMSPhi3MoEForCausalLM",
        ("gate_up_proj", "down_proj"),
        _PHI3_DEFAULTS,
        ("bunny-phi3", "phi3"),
    ),
    _Backbone(
        "bunny-mm-llama3-moe-s",
        "BunnyMMSLlamaMoEForCausalLM",
        ("gate_proj", "up_proj", "down_proj"),
        _LLAMA_DEFAULTS,
        ("bunny-llama", "llama"),
    ),
)


@dataclass(frozen=True)
class SparseShape:
    """What upcycling makes.

    Attributes:
        model_type, architecture: the MoIIE class of the backbone.
        mlp_leaves: names of a feed-forward's projections.
        num_experts, top_k: experts a layer, experts a token.
        reach: rows of each gate, the experts one modality may reach (spec 1.6).
        has_experts: the checkpoint was converted already and only lacks gates.
        defaults: values of backbone keys that the MoIIE class needs and the dense class has defaults for (spec 3).
    """

    model_type: str
    architecture: str
    mlp_leaves: tuple[str, ...]
    num_experts: int
    top_k: int
    reach: int
    has_experts: bool
    defaults: Mapping[str, Any]


def sparse_shape(config: Mapping[str, Any], where: str, num_experts: int | None, top_k: int | None) -> SparseShape:
    """The shape that upcycling a checkpoint with this config.json gives.

    Args:
        config: the parsed config.json.
        where: its path, for messages.
        num_experts: asked for; None: 4, or what a converted checkpoint says.
        top_k: asked for; None: 2, or what a converted checkpoint says.

    Raises:
        MoiieError: a model that cannot be upcycled, or numbers that do not fit each other.
    """
    reader = ConfigReader(config, where)
    kind = reader.text("model_type")
    backbone = next((b for b in _BACKBONES if kind in (b.model_type, *b.dense)), None)
    if backbone is None:
        dense = ", ".join(name for b in _BACKBONES for name in b.dense)
        raise MoiieError(
            f"{where}: model_type: {kind!r} cannot be upcycled: expected a dense model ({dense})",
            "give the dense checkpoint that this one was made from",
        )
    converted = kind == backbone.model_type
    experts = _settle((reader, where), "num_experts", num_experts, 4, converted)
    reach = int(experts / 2 + experts / 4)
    if reach < 1:
        raise MoiieError(f"--experts {experts}: a MoIIE layer needs at least 2 experts", "the authors use 4")
    chosen = _settle((reader, where), "num_experts_per_tok", top_k, 2, converted)
    if not 1 <= chosen <= reach:
        raise MoiieError(
            f"--top-k {chosen}: with {experts} experts a token may reach {reach}",
            f"use 1 to {reach}; the authors use 2",
        )
    return SparseShape(
        backbone.model_type,
        backbone.architecture,
        backbone.mlp_leaves,
        experts,
        chosen,
        reach,
        converted,
        {**_DEFAULTS, **backbone.defaults},
    )


def sparse_config(config: Mapping[str, Any], shape: SparseShape) -> dict[str, Any]:
    """config.json of the MoIIE checkpoint: the dense one's keys, the MoIIE class and its keys (spec Appendix B).

    The two output flags are false, unlike in the authors' converter, because true breaks their generation (spec 2.3);
    router_jitter_noise is written, because their class cannot be built without it (spec 1.8).
    """
    moe = {"vis_router_aux_loss_coef": 0.001, "lan_router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}
    return {
        **shape.defaults,
        **moe,
        **config,
        "model_type": shape.model_type,
        "architectures": [shape.architecture],
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "output_vis_router_logits": False,
        "output_lan_router_logits": False,
    }


def _settle(file: tuple[ConfigReader, str], key: str, asked: int | None, default: int, converted: bool) -> int:
    """The number asked for; a converted checkpoint's own number must agree with it."""
    if not converted:
        return default if asked is None else asked
    reader, where = file
    found = reader.integer(key)
    if asked is not None and asked != found:
        raise MoiieError(
            f"{where}: {key}: the checkpoint was converted with {found}, asked for {asked}",
            "leave the option out, or start from the dense checkpoint",
        )
    return found
