"""The authors' tensor names behind each name of a converted checkpoint, as data (spec mome.md, section 7)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moiie_export.convert.sources import DINO, EVA, MOME, PIX2STRUCT, SENTENCE, VICUNA
from moiie_export.weights import Shape


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of an original tensor, whose whole shape is `shape`."""

    source: str
    tensor: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class Resized:
    """A table of positions brought to another grid."""

    source: str
    tensor: str
    shape: Shape
    grid: int


@dataclass(frozen=True)
class Constant:
    """A vector or matrix of one value, which no file holds."""

    value: float
    shape: Shape


Piece = Rows | Resized | Constant


@dataclass(frozen=True)
class Layout:
    """What may differ between files of the same model.

    Attributes:
        single_adapter: a checkpoint of the authors' first stage: one adapter a layer and no router that chooses.
        pix2struct, sentence: what stands in front of the encoder's names, when it was saved inside a larger model.
        positions: rows of DINOv2's stored position table.
    """

    single_adapter: bool
    pix2struct: str
    sentence: str
    positions: int


_LAYER = r"language_model\.model\.layers\.(\d+)\.mlp\.mole\."
_ADAPTER = r"llm_model.model.layers.\1.mlp.adapter."
_EVA_LAYER, _DINO_LAYER = r"clip_tower\.encoder\.layers\.(\d+)\.", r"dino_tower\.encoder\.layer\.(\d+)\."
_RULES = tuple(
    (re.compile(ours), source, theirs)
    for ours, source, theirs in (
        (r"move\.clip\.norm\.(\w+)", MOME, r"clip_ln.\1"),
        (r"move\.clip\.projector\.(\w+)", MOME, r"clip_proj.\1"),
        (r"move\.dino\.adt\.(.+)", MOME, r"dino_selector.\1"),
        (r"move\.dino\.projector\.(\w+)", MOME, r"dino_llm_proj.\1"),
        (r"move\.pix2struct\.adt\.(.+)", MOME, r"pix_selector.\1"),
        (r"move\.pix2struct\.projector\.(\w+)", MOME, r"pix_llm_proj.\1"),
        (r"move\.router\.fc1\.(\w+)", MOME, r"move_router.router.0.\1"),
        (r"move\.router\.fc2\.(\w+)", MOME, r"move_router.router.2.\1"),
        (_LAYER + r"experts\.(\d+)\.(.+)", MOME, _ADAPTER + r"adapters.\2.\3"),
        (_LAYER + r"router\.fc1\.(\w+)", MOME, _ADAPTER + r"router_mlp.0.\2"),
        (_LAYER + r"router\.fc2\.(\w+)", MOME, _ADAPTER + r"router_mlp.2.\2"),
        (r"clip_tower\.embeddings\.class_embedding", EVA, r"cls_token"),
        (r"clip_tower\.embeddings\.position_embedding", EVA, r"pos_embed"),
        (r"clip_tower\.embeddings\.patch_embedding\.(\w+)", EVA, r"patch_embed.proj.\1"),
        (_EVA_LAYER + r"layer_norm([12])\.(\w+)", EVA, r"blocks.\1.norm\2.\3"),
        (_EVA_LAYER + r"self_attn\.qkv\.weight", EVA, r"blocks.\1.attn.qkv.weight"),
        (_EVA_LAYER + r"self_attn\.projection\.(\w+)", EVA, r"blocks.\1.attn.proj.\2"),
        (_EVA_LAYER + r"mlp\.(.+)", EVA, r"blocks.\1.mlp.\2"),
        (r"dino_tower\.embeddings\.cls_token", DINO, r"cls_token"),
        (r"dino_tower\.embeddings\.patch_embeddings\.projection\.(\w+)", DINO, r"patch_embed.proj.\1"),
        (_DINO_LAYER + r"norm([12])\.(\w+)", DINO, r"blocks.\1.norm\2.\3"),
        (_DINO_LAYER + r"attention\.output\.dense\.(\w+)", DINO, r"blocks.\1.attn.proj.\2"),
        (_DINO_LAYER + r"layer_scale([12])\.lambda1", DINO, r"blocks.\1.ls\2.gamma"),
        (_DINO_LAYER + r"mlp\.(.+)", DINO, r"blocks.\1.mlp.\2"),
        (r"dino_tower\.layernorm\.(\w+)", DINO, r"norm.\1"),
        (r"pix2struct_tower\.(.+)", PIX2STRUCT, r"\1"),
        (r"sentence_encoder\.(.+)", SENTENCE, r"\1"),
        (r"language_model\.((?!.*\.mole\.).+)", VICUNA, r"\1"),
    )
)
_EVA_BIAS = re.compile(_EVA_LAYER + r"self_attn\.qkv\.bias")
_DINO_QKV = re.compile(_DINO_LAYER + r"attention\.attention\.(query|key|value)\.(weight|bias)")
_DINO_POSITIONS = "dino_tower.embeddings.position_embeddings"
_EXPERT = re.compile(_LAYER + r"experts\.\d+\.(.+)")
_ROUTER = re.compile(_LAYER + r"router\..+")

DROPPED = tuple(
    (source, re.compile(theirs), reason)
    for source, theirs, reason in (
        (
            MOME,
            r"visual_encoder\..*|dino_encoder\..*|pix2struct_encoder\..*|bert_model\..*",
            "frozen: its own file counts",
        ),
        (MOME, r"llm_model\.(?!.*\.adapter\.).*", "frozen: its own file counts"),
        (MOME, r".*level_start_index|.*\.inv_freq", "a buffer"),
        (EVA, r"(norm|fc_norm|head)\..*", "EVA's head: features are taken before it"),
        (DINO, r"mask_token|head\..*", "used in pre-training only"),
        (PIX2STRUCT, r"decoder\..*", "the text decoder"),
        (VICUNA, r".*\.inv_freq", "a buffer"),
        (SENTENCE, r"(bert\.)?(pooler\..*|embeddings\.position_ids)", "a sentence is the mean of its tokens"),
    )
)
"""Tensors of the originals that no converted checkpoint holds: (source, name, why)."""


def pieces_of(name: str, shape: Shape, layout: Layout) -> tuple[Piece, ...]:
    """What a tensor of the converted checkpoint is made of, one behind the other along its first axis."""
    if match := _EVA_BIAS.fullmatch(name):  # keys have no bias
        width = (shape[0] // 3,)
        block = f"blocks.{match[1]}.attn."
        return _all(EVA, f"{block}q_bias", width), Constant(0.0, width), _all(EVA, f"{block}v_bias", width)
    if match := _DINO_QKV.fullmatch(name):
        rows, place = shape[0], ("query", "key", "value").index(match[2])
        whole = (3 * rows, *shape[1:])
        return (Rows(DINO, f"blocks.{match[1]}.attn.qkv.{match[3]}", whole, place * rows, (place + 1) * rows),)
    if name == _DINO_POSITIONS:
        return (Resized(DINO, "pos_embed", (1, layout.positions, shape[2]), round((shape[1] - 1) ** 0.5)),)
    if layout.single_adapter and (match := _EXPERT.fullmatch(name)):
        return (_all(MOME, f"llm_model.model.layers.{match[1]}.mlp.adapter.{match[2]}", shape),)
    if layout.single_adapter and _ROUTER.fullmatch(name):
        return _first_adapter(name, shape)
    for pattern, source, theirs in _RULES:
        if match := pattern.fullmatch(name):
            prefix = {PIX2STRUCT: layout.pix2struct, SENTENCE: layout.sentence}.get(source, "")
            return (_all(source, prefix + match.expand(theirs), shape),)
    raise RuntimeError(f"{name}: no rule says what it is made of")


def _all(source: str, tensor: str, shape: Shape) -> Rows:
    return Rows(source, tensor, shape, 0, shape[0])


def _first_adapter(name: str, shape: Shape) -> tuple[Constant, ...]:
    """A router that picks the first of equal adapters, and not by a tie, which each platform may break otherwise."""
    if name.endswith("fc2.bias"):
        return Constant(1.0, (1,)), Constant(0.0, (shape[0] - 1,))
    return (Constant(0.0, shape),)
