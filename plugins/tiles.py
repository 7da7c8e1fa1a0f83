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
    # 4 to 16 KiB of weights in flight a program, from few enough registers for several programs an SM. There are few
    # programs of `down`, a token's hidden_size / 8: each reads more at once.
    ("expert_decode_gate_up", 16): _tile(4, BLOCK_N=8, BLOCK_K=512),
    ("expert_decode_gate_up", 8): _tile(4, BLOCK_N=8, BLOCK_K=512),
    ("expert_decode_gate_up", 4): _tile(4, BLOCK_N=8, BLOCK_K=1024),
    ("expert_decode_down", 16): _tile(4, BLOCK_N=8, BLOCK_K=1024),
    ("expert_decode_down", 8): _tile(4, BLOCK_N=8, BLOCK_K=2048),
    ("expert_decode_down", 4): _tile(4, BLOCK_N=8, BLOCK_K=2048),
}

_GATE_UP, _DOWN = "expert_prefill_gate_up", "expert_prefill_down"
_NARROW = _tile(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64)
"""64 gate and 64 up rows: sums in 64 registers of a thread."""
_PREFILL_SMALL = {_GATE_UP: _NARROW, _DOWN: _tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)}
"""For GPUs with 99 KiB of shared memory a block, and Orin, which has few SMs."""
_PREFILL_LARGE = {
    _GATE_UP: _tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
    _DOWN: _tile(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
}
_PREFILL_LARGE_UNPACKING = {**_PREFILL_LARGE, _GATE_UP: _NARROW}
"""Unpacking weights and multiplying them alternate within a program, so that two must share an SM: 128 registers a thread."""


def kernel_tile(function: str, bits: int, sm: int) -> Tile:
    """How a kernel function is cut for weights of `bits` bits (0: it has none) on an SM."""
    if function in _SMALL:
        return _SMALL[function]
    if (function, bits) in _DECODE:
        return _DECODE[function, bits]
    if not 90 <= sm < 120:
        return _PREFILL_SMALL[function]
    return (_PREFILL_LARGE if bits == 16 else _PREFILL_LARGE_UNPACKING)[function]
