"""Checkpoints written in shards: values, order, index, and conversions that lose nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_writer import INDEX, NewTensor, to_stored, write_checkpoint

TENSORS = (
    NewTensor("half", "F16", (3, 4)),
    NewTensor("whole", "F32", (5,)),
    NewTensor("brain", "BF16", (2, 3)),
    NewTensor("large", "F32", (40, 2)),
    NewTensor("last", "F16", (1,)),
)


def values(tensor: NewTensor) -> Iterator[npt.NDArray[np.generic]]:
    """The tensor's index among all, row by row."""
    number = float(TENSORS.index(tensor))
    for _ in range(tensor.shape[0]):
        yield to_stored(np.full(tensor.shape[1:], number, np.float32), tensor.dtype)


@pytest.mark.parametrize("shard_bytes", [10**6, 60, 1])
def test_every_value_is_where_the_index_says(tmp_path: Path, shard_bytes: int) -> None:
    steps: list[tuple[int, int]] = []
    names = write_checkpoint(tmp_path, TENSORS, values, shard_bytes, lambda *step: steps.append(step))
    total = sum(tensor.bytes for tensor in TENSORS)
    assert steps[-1] == (total, total)
    assert (tmp_path / INDEX).exists() == (len(names) > 1)
    assert len(names) == {10**6: 1, 60: 3, 1: 5}[shard_bytes]
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        for number, tensor in enumerate(TENSORS):
            assert checkpoint.tensors[tensor.name].dtype == tensor.dtype
            rows = checkpoint.rows(tensor.name, 0, tensor.shape[0])
            assert rows.shape == tensor.shape
            assert (rows == number).all()
    if len(names) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == total
        assert list(dict.fromkeys(index["weight_map"][tensor.name] for tensor in TENSORS)) == names


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0, 2**16, dtype=np.uint32) << 16) | 0x8000
    numbers = np.concatenate([bits, ties]).view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    expected = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_stored(numbers, "BF16"), expected)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_other_dtypes_keep_their_values(dtype: str) -> None:
    numbers = np.arange(-8, 8, dtype=np.float32) / 4
    stored = to_stored(numbers, dtype)
    assert stored.dtype.itemsize == {"F64": 8, "F32": 4, "F16": 2}[dtype]
    assert (stored == numbers).all()
