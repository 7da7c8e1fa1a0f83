"""What a conversion writes: every tensor of the new checkpoint with the originals' tensors behind it, all checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from moiie_export.checkpoint_writer import NewTensor
from moiie_export.convert.keys import DROPPED, Constant, Layout, Piece, Resized, Rows, pieces_of
from moiie_export.convert.sources import DINO, EVA, MOME, PIX2STRUCT, SENTENCE, Weights, where
from moiie_export.mome_config import DinoConfig, EvaConfig, MomeConfig
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_export.weights import Shape
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import quote

log = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_HINTS: Mapping[str, str] = {
    MOME: "the checkpoint is incomplete, or was trained with other sizes than the published ones: --config",
    EVA: "give eva_vit_g.pth, the tower of BLIP-2; other sizes go into --config",
    DINO: "give dinov2_vitl14_pretrain.pth, without registers; other sizes go into --config",
    PIX2STRUCT: "give google/pix2struct-base",
    SENTENCE: "give sentence-transformers/all-MiniLM-L6-v2",
}


@dataclass(frozen=True)
class Converted(NewTensor):
    """A tensor of the new checkpoint and what it is made of."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """A conversion that fits its sources.

    Attributes:
        tensors: in the order in which they are written.
        single_adapter: whether the checkpoint is of the first stage.
        trainable_values: numbers in the tensors of the MoME checkpoint that are used.
        dropped: source -> how many of its tensors are not used.
    """

    tensors: tuple[Converted, ...]
    single_adapter: bool
    trainable_values: int
    dropped: Mapping[str, int]


def make_plan(config: MomeConfig, positions: int, sources: Mapping[str, Weights]) -> Plan:
    """Find everything the model needs in the sources.

    Args:
        config: the model.
        positions: rows of DINOv2's position table as stored.
        sources: by name, opened.

    Raises:
        MoiieError: a tower of another size, a tensor that is missing, misshapen, not of floats, or unknown; named as in
            its file, with the file.
    """
    _check_towers(config, sources)
    layout = _layout(sources, positions)
    weights = build_mome_weight_map(config, config.text.vocab_size, {}).weights
    wanted = {part.tensor: pieces_of(part.tensor, part.shape, layout) for weight in weights for part in weight.parts}
    used: dict[str, dict[str, Shape]] = {name: {} for name in sources}
    for pieces in wanted.values():
        for piece in pieces:
            if not isinstance(piece, Constant):
                used[piece.source][piece.tensor] = piece.shape
    for name, source in sources.items():
        _check_tensors(name, source, used[name])
    shapes = {part.tensor: part.shape for weight in weights for part in weight.parts}
    tensors = tuple(Converted(name, _dtype(pieces, sources), shapes[name], pieces) for name, pieces in wanted.items())
    dropped = {name: _count_dropped(name, source, used[name], config) for name, source in sources.items()}
    return Plan(tensors, layout.single_adapter, sum(map(prod, used[MOME].values())), dropped)


def _layout(sources: Mapping[str, Weights], positions: int) -> Layout:
    names = {name: source.tensors.keys() for name, source in sources.items()}
    adapters = [tensor for tensor in names[MOME] if ".mlp.adapter." in tensor]
    single = [tensor for tensor in adapters if re.search(r"\.adapter\.(down_proj|up_proj|scale)", tensor)]
    several = [tensor for tensor in adapters if ".adapter.adapters." in tensor]
    if single and several:
        raise MoiieError(
            f"{sources[MOME].path}: adapters of both stages: found {quote(single[0])} and {quote(several[0])}",
            "give the checkpoint of one stage",
        )
    inside = "encoder.embeddings.patch_projection.weight" in names[PIX2STRUCT]
    bert = "bert.embeddings.word_embeddings.weight" in names[SENTENCE]
    return Layout(bool(single), "encoder." if inside else "", "bert." if bert else "", positions)


def _check_towers(config: MomeConfig, sources: Mapping[str, Weights]) -> None:
    """One error for a tower of another size instead of hundreds of tensors."""
    for expert in config.experts:
        tower = expert.tower
        if isinstance(tower, EvaConfig):
            # the last block of the published file is not used, and may have been cut off
            _check_tower(EVA, sources[EVA], tower, (tower.num_hidden_layers, tower.num_hidden_layers + 1))
        elif isinstance(tower, DinoConfig):
            _check_tower(DINO, sources[DINO], tower, (tower.num_hidden_layers,))


def _check_tower(name: str, source: Weights, tower: EvaConfig | DinoConfig, depths: Sequence[int]) -> None:
    kernel = source.tensors.get("patch_embed.proj.weight")
    if kernel is None or len(kernel.shape) != 4:
        raise MoiieError(
            f"{source.path}: no {name} tower under its authors' names: expected tensor 'patch_embed.proj.weight',"
            f" found {', '.join(map(quote, list(source.tensors)[:3]))}, ...",
            _HINTS[name],
        )
    found = (_depth(source.tensors), kernel.shape[0], kernel.shape[-1])
    if found[0] not in depths or found[1:] != (tower.hidden_size, tower.patch_size):
        raise MoiieError(
            f"{source.path}: a tower of another size: expected {' or '.join(map(str, depths))} blocks of width"
            f" {tower.hidden_size} and patches of {tower.patch_size}, found {found[0]}, {found[1]} and {found[2]}",
            _HINTS[name],
        )


def _depth(tensors: Iterable[str]) -> int:
    return len({match[1] for tensor in tensors if (match := _BLOCK.match(tensor))})


def _check_tensors(name: str, source: Weights, used: Mapping[str, Shape]) -> None:
    hint = _HINTS.get(name, "give Vicuna-7B v1.5")
    missing = [tensor for tensor in used if tensor not in source.tensors]
    if missing:
        raise MoiieError(
            f"{source.path}: {len(missing)} tensor(s) missing, the first: {quote(missing[0])}, expected shape"
            f" {list(used[missing[0]])}{_values(name, source, used)}",
            hint,
        )
    for tensor, shape in used.items():
        entry = source.tensors[tensor]
        if entry.shape != shape:
            raise MoiieError(
                f"{where(source, tensor)}: tensor {quote(tensor)}: expected shape {list(shape)}, found"
                f" {list(entry.shape)}{_values(name, source, used)}",
                hint,
            )
        if entry.dtype not in _FLOATS:
            raise MoiieError(
                f"{where(source, tensor)}: tensor {quote(tensor)}: expected {', '.join(_FLOATS)}, found {entry.dtype}",
                "give the weights as they were published, not quantised",
            )


def _values(name: str, source: Weights, used: Mapping[str, Shape]) -> str:
    """How many trained numbers there should be and are, for messages about the MoME checkpoint."""
    if name != MOME:
        return ""
    found = sum(prod(source.tensors[tensor].shape) for tensor in used if tensor in source.tensors)
    return f" (expected {sum(map(prod, used.values()))} trained values in all, found {found})"


def _count_dropped(name: str, source: Weights, used: Mapping[str, Shape], config: MomeConfig) -> int:
    unused = [tensor for tensor in source.tensors if tensor not in used]
    rules = [(pattern, reason) for owner, pattern, reason in DROPPED if owner == name] + list(_last_block(name, config))
    for tensor in unused:
        reason = next((reason for pattern, reason in rules if pattern.fullmatch(tensor)), None)
        if reason is None:
            raise MoiieError(
                f"{where(source, tensor)}: tensor {quote(tensor)}: not a part of the model that is expected here",
                "this is another model or another variant of it, which would not be computed rightly",
            )
        log.debug("%s: %s is left out: %s", source.path, tensor, reason)
    return len(unused)


def _last_block(name: str, config: MomeConfig) -> Iterator[tuple[re.Pattern[str], str]]:
    for expert in config.experts:
        if name == EVA and isinstance(expert.tower, EvaConfig):
            depth = expert.tower.num_hidden_layers
            yield re.compile(rf"blocks\.{depth}\..*"), "features are taken before the last block"


def _dtype(pieces: Sequence[Piece], sources: Mapping[str, Weights]) -> str:
    """That of the originals; float32 where they differ, or where values are computed."""
    found = {sources[piece.source].tensors[piece.tensor].dtype for piece in pieces if isinstance(piece, Rows)}
    exact = len(found) != 1 or any(isinstance(piece, Resized) for piece in pieces)
    dtype = "F32" if exact else found.pop()
    return "F32" if dtype == "F64" else dtype
