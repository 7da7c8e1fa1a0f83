"""Dense checkpoint -> MoIIE checkpoint: the authors' upcycling (spec moiie.md, section 6, convert_moe).

The feed-forward of every odd layer becomes the first of E equal experts; gates are drawn from N(0, 0.02), so that before
any training the sparse model computes what the dense one does. Tensors are streamed: memory stays at one block.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_files import CONFIG
from moiie_export.checkpoint_writer import SHARD_BYTES, NewTensor, to_stored, write_checkpoint
from moiie_export.disk import check_absent, copy_file, new_directory, write_json
from moiie_export.source import BLOCK_BYTES
from moiie_export.stages import Progress
from moiie_export.upcycle_config import SparseShape, sparse_config, sparse_shape
from moiie_runtime.errors import MoiieError

_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")
_LEFT_BEHIND = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|index\.json)|config\.json|trainer_state\.json")


@dataclass(frozen=True)
class Upcycling:
    """What to make: experts a layer and experts a token (None: 4 and 2, or what a converted checkpoint says), gates' seed."""

    num_experts: int | None = None
    top_k: int | None = None
    seed: int = 0
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class UpcycleResult:
    """A written checkpoint: where, its shape, the layers with experts, tensor bytes, and its tensor files."""

    path: Path
    shape: SparseShape
    layers: tuple[int, ...]
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor(NewTensor):
    """A tensor of the output; `source` is the tensor it copies, None for a gate that is drawn."""

    source: str | None


def upcycle(
    checkpoint: Path, output: Path, options: Upcycling | None = None, progress: Progress | None = None
) -> UpcycleResult:
    """Convert a dense checkpoint to a MoIIE checkpoint of the same backbone, or add gates to a converted one.

    Args:
        checkpoint: directory with config.json and weights (safetensors or .bin, one file or shards).
        output: directory to write; must not exist, or be empty. It appears when it is complete.
        options: what to make.
        progress: called with (step, bytes done, bytes in all).

    Raises:
        MoiieError: the checkpoint is sparse already, of another kind, an adapter or projector alone, incomplete; the
            numbers of experts do not fit; or the output exists.
    """
    options = options or Upcycling()
    report = progress or (lambda *_: None)
    check_absent(output)
    if output.resolve() == checkpoint.resolve():
        raise MoiieError(f"{output}: is the checkpoint itself", "choose another -o")
    with Checkpoint.open(checkpoint) as source:
        shape = sparse_shape(source.config, str(source.path / CONFIG), options.num_experts, options.top_k)
        tensors, layers = _plan(source, shape)
        total = sum(tensor.bytes for tensor in tensors)
        with new_directory(output, total) as partial:
            files = write_checkpoint(
                partial,
                tensors,
                lambda tensor: _values(source, tensor, options.seed),
                options.shard_bytes,
                lambda done, total: report("upcycle", done, total),
            )
            _copy_other_files(source.path, partial)
            write_json(partial / CONFIG, sparse_config(source.config, shape))
    return UpcycleResult(output, shape, layers, total, tuple(files))


def check_upcycled(dense: Path, sparse: Path) -> None:
    """Read both checkpoints and compare them: experts with the dense feed-forward, all other tensors with their namesakes.

    Raises:
        MoiieError: naming the first tensor that is missing, unknown or differs in dtype, shape or a single bit.
    """
    with Checkpoint.open(dense) as source, Checkpoint.open(sparse) as made:
        shape = sparse_shape(source.config, str(source.path / CONFIG), made.config.get("num_experts"), None)
        tensors, _ = _plan(source, shape)
        expected = {tensor.name: tensor for tensor in tensors}
        if difference := sorted(expected.keys() ^ made.tensors.keys()):
            raise MoiieError(f"{sparse}: {len(difference)} tensors missing or unknown, the first: {difference[0]}")
        for tensor in tensors:
            entry = made.tensors[tensor.name]
            same = (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
            if same and tensor.source is not None:
                pairs = zip(_blocks(source, tensor.source), _blocks(made, tensor.name), strict=True)
                same = all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)
            if not same:
                raise MoiieError(f"{sparse}: {tensor.name}: differs from {tensor.source or 'what upcycling makes'}")


def _plan(source: Checkpoint, shape: SparseShape) -> tuple[list[_Tensor], tuple[int, ...]]:
    """The tensors of the output in the order of the input's, and the layers that hold experts."""
    tensors: list[_Tensor] = []
    layers: dict[int, str] = {}
    for name, entry in source.tensors.items():
        match = _MLP.fullmatch(name)
        if match is None or int(match[1]) % 2 == 0:
            tensors.append(_Tensor(name, entry.dtype, entry.shape, name))
            continue
        layer, rest = int(match[1]), match[2]
        layers.setdefault(layer, entry.dtype)
        if rest in ("gate.weight", "gate_vis.weight"):
            raise MoiieError(f"{source.path}: is sparse already: {name} is a router gate", "export it as it is")
        if rest.startswith("experts.") != shape.has_experts:
            kind = "a converted" if shape.has_experts else "a dense"
            raise MoiieError(
                f"{source.path / entry.file}: {name}: not a tensor of {kind} model, which {CONFIG} describes",
                "config.json and the weights do not belong together",
            )
        copies = [rest] if shape.has_experts else [f"experts.{e}.{rest}" for e in range(shape.num_experts)]
        tensors += [_Tensor(f"model.layers.{layer}.mlp.{c}", entry.dtype, entry.shape, name) for c in copies]
    _check_layers(source, shape, set(layers))
    hidden = source.config["hidden_size"]
    gates = [
        _Tensor(f"model.layers.{layer}.mlp.{gate}.weight", layers[layer], (shape.reach, hidden), None)
        for layer in sorted(layers)
        for gate in ("gate", "gate_vis")
    ]
    return tensors + gates, tuple(sorted(layers))


def _check_layers(source: Checkpoint, shape: SparseShape, found: set[int]) -> None:
    """Every odd layer has its whole feed-forward, and a converted one all its experts."""
    count = source.config["num_hidden_layers"]
    prefixes = [f"experts.{e}." for e in range(shape.num_experts)] if shape.has_experts else [""]
    for layer in range(1, count, 2):
        for prefix in prefixes:
            for leaf in shape.mlp_leaves:
                name = f"model.layers.{layer}.mlp.{prefix}{leaf}.weight"
                if name not in source.tensors:
                    raise MoiieError(
                        f"{source.path}: tensor {name} is missing", "the checkpoint is incomplete: copy it again"
                    )
    if extra := sorted(layer for layer in found if layer >= count):
        raise MoiieError(f"{source.path / CONFIG}: num_hidden_layers is {count}, but the weights have layer {extra[0]}")


def _values(source: Checkpoint, tensor: _Tensor, seed: int) -> Iterator[npt.NDArray[Any]]:
    """The tensor's values in its own dtype, block by block."""
    if tensor.source is None:
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        deviation = float(source.config.get("initializer_range", 0.02))
        yield to_stored(rng.normal(0.0, deviation, tensor.shape).astype(np.float32), tensor.dtype)
        return
    for block in _blocks(source, tensor.source):
        yield to_stored(block, tensor.dtype)


def _blocks(source: Checkpoint, name: str) -> Iterator[npt.NDArray[np.float32]]:
    shape = source.tensors[name].shape or (1,)
    step = max(1, BLOCK_BYTES // (4 * max(1, prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield source.rows(name, start, min(shape[0], start + step))


def _copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, generation_config and the like; no weights, no training state, no directories."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _LEFT_BEHIND.fullmatch(path.name):
            copy_file(path, target / path.name)


def summary(result: UpcycleResult) -> Mapping[str, Any]:
    """The result as JSON data."""
    shape = result.shape
    return {
        "checkpoint": result.path,
        "model_type": shape.model_type,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "layers": list(result.layers),
        "bytes": result.bytes,
        "files": list(result.files),
    }
