"""Writing a checkpoint as save_pretrained does: safetensors in shards of bounded size, with an index when there are several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moiie_export.disk import write_json
from moiie_runtime.tensor_header import ITEM_SIZES
from moiie_runtime.tensor_writer import TensorWriter

SHARD_BYTES = 2_000_000_000
"""Shards hold at most this many bytes of tensors, as the authors' converters write them."""
INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `dtype` by its safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return ITEM_SIZES[self.dtype] * prod(self.shape)


T = TypeVar("T", bound=NewTensor)


def write_checkpoint(
    directory: Path,
    tensors: Sequence[T],
    values: Callable[[T], Iterable[npt.NDArray[Any]]],
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """Write tensors in shards, block by block.

    Args:
        directory: where to; it exists.
        tensors: what to write, in order.
        values: a tensor's values, in its own dtype (see `to_stored`), as consecutive blocks.
        shard_bytes: bytes of tensors a shard may hold; a tensor larger than that has a shard of its own.
        report: called with (bytes done, bytes in all).

    Returns:
        The names of the tensor files.

    Raises:
        MoiieError: a file cannot be written.
    """
    shards = list(_shards(tensors, shard_bytes))
    total, done = sum(tensor.bytes for tensor in tensors), 0
    weight_map: dict[str, str] = {}
    names = []
    for number, shard in enumerate(shards, start=1):
        several = len(shards) > 1
        names.append(f"model-{number:05}-of-{len(shards):05}.safetensors" if several else "model.safetensors")
        specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard}
        with TensorWriter(directory / names[-1], specs, {"format": "pt"}) as writer:
            for tensor in shard:
                for block in values(tensor):
                    writer.write_elements(block, tensor.name)
                    done += block.nbytes
                    report(done, total)
        weight_map |= dict.fromkeys(specs, names[-1])
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return names


def _shards(tensors: Sequence[T], limit: int) -> Iterator[list[T]]:
    """Consecutive tensors of at most `limit` bytes together (one tensor may exceed it), wide dtypes first in each."""
    shard: list[T] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.bytes > limit:
            yield sorted(shard, key=lambda t: -ITEM_SIZES[t.dtype])
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.bytes
    yield sorted(shard, key=lambda t: -ITEM_SIZES[t.dtype])


def to_stored(block: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 values in the dtype they came from; exact for copies. Bfloat16 is uint16 bits, rounded to even."""
    if dtype != "BF16":
        return block.astype(_DTYPES[dtype], copy=False)
    bits = block.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isfinite(block), rounded, bits >> 16).astype(np.uint16)
