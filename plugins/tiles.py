"""Block sizes, warps and pipeline stages of every kernel, and what a GPU allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99}
"""Shared memory that one block may have, by SM. Its keys are the SMs that are supported."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut on one kind of GPU."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1


def _tile(num_warps: int, num_stages: int = 1, **blocks: int) -> Tile:
    return Tile(blocks, num_warps, num_stages)


_SMALL = {
    "expert_route": _tile(8, BLOCK_M=128, CHUNK=1024),
    "expert_combine": _tile(4, BLOCK_N=1024),
    "kv_cache_update": _tile(1, BLOCK_D=128),
    "decode_attention_split": _tile(4, 2, BLOCK_D=128, BLOCK_M=16, BLOCK_S=64, SPLIT=256),
    "decode_attention_merge": _tile(1, BLOCK_D=128),
    "deformable_sample": _tile(4, BLOCK_Q=16, BLOCK_D=64),
}

_DECODE = {
    # About 16 KiB of weights in flight a program, from few enough registers for several programs an SM.
    ("expert_decode_gate_up", 16): _tile(4, BLOCK_N=8, BLOCK_K=512),
    ("expert_decode_gate_up", 8): _tile(4, BLOCK_N=8, BLOCK_K=512),
    ("expert_decode_gate_up", 4): _tile(4, BLOCK_N=8, BLOCK_K=1024),
    ("expert_decode_down", 16): _tile(4, BLOCK_N=8, BLOCK_K=1024),
    ("expert_decode_down", 8): _tile(4, BLOCK_N=8, BLOCK_K=1024),
    ("expert_decode_down", 4): _tile(4, BLOCK_N=8, BLOCK_K=1024),
}

_PREFILL_NARROW = {
    "expert_prefill_gate_up": _tile(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
    "expert_prefill_down": _tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
}
"""For GPUs with 99 KiB of shared memory a block, and Orin, which has few SMs."""

_PREFILL_WIDE = {
    "expert_prefill_gate_up": _tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
    "expert_prefill_down": _tile(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
}


def kernel_tile(function: str, bits: int, sm: int) -> Tile:
    """How a kernel function is cut for weights of `bits` bits (0: it has none) on an SM."""
    if function in _SMALL:
        return _SMALL[function]
    if (function, bits) in _DECODE:
        return _DECODE[function, bits]
    prefill = _PREFILL_WIDE if 90 <= sm < 120 else _PREFILL_NARROW
    return prefill[function]
