"""What an export to int4 is compared with: copying the checkpoint, and rounding the same tensors with PyTorch.

usage: python -m tests.bench.full_compare CHECKPOINT BUNDLE FOLDER THREADS; prints one JSON document
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_ROWS = 4096  # rounded at once, so that memory stays small


def quantised_tensors(manifest: dict[str, Any]) -> dict[str, int]:
    """Checkpoint tensors that a bundle holds in int4, with their group size."""
    weights = manifest["quantization"]["weights"]
    found = {}
    for tensor, entry in manifest["completeness"]["tensors"].items():
        stored = weights.get(entry["weight"])
        if stored is not None and stored["format"] == "int4":
            found[tensor] = int(stored["group_size"])
    return found


def round_to_nearest(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int4 values a byte and float16 scales of `weight` [rows, columns]."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // group, group)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half()
    scales[scales == 0] = 1
    values = (groups / scales.float()).round_().clamp_(-8, 7).to(torch.int8).view(rows, columns)
    return (values[:, 0::2] & 15) | (values[:, 1::2] << 4), scales


def main() -> None:
    """Do both, one after the other."""
    checkpoint, bundle, folder = map(Path, sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[4]))
    groups = quantised_tensors(json.loads((bundle / "bundle.json").read_text()))
    shards = sorted(checkpoint.glob("*.safetensors"))
    started = time.perf_counter()
    copy = folder / "copy.safetensors"
    for shard in shards:  # one after another into the same place: a full-size model need not fit twice
        shutil.copyfile(shard, copy)
        copy.unlink()
    copied = time.perf_counter()
    numbers = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in groups:
                    rows = file.get_slice(name)
                    for first in range(0, rows.get_shape()[0], _ROWS):
                        block = rows[first : first + _ROWS]
                        round_to_nearest(block, groups[name])
                        numbers += block.numel()
    ended = time.perf_counter()
    seconds = {"copy_seconds": copied - started, "round_seconds": ended - copied}
    copied_bytes = sum(shard.stat().st_size for shard in shards)
    print(json.dumps({**seconds, "numbers": numbers, "tensors": len(groups), "copied_bytes": copied_bytes}))


if __name__ == "__main__":
    main()
