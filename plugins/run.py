"""Runs an op's plan through Triton: on a GPU, or on CPU tensors where TRITON_INTERPRET=1 was set before the import.

It follows the same plans as the C++ shell. Tests and measurements use it; nothing that ships to a device does.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moiie_plugins.launch import Launch, Plan, choose, plans

Tensors = Mapping[str, torch.Tensor]
_PLANS = plans()


def _dims(tensors: Tensors, legend: Mapping[str, str]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    for name, dims in legend.items():
        for dim, size in zip(dims.split(), tensors[name].shape, strict=True):
            if symbols.setdefault(dim, size) != size:
                raise ValueError(f"{name}: dimension {dim} is {size}, elsewhere {symbols[dim]}")
    return symbols


_LEGENDS = {
    "ExpertDispatch": {"hidden": "T H", "expert_ids": "T top_k"},
    "QuantizedExpertDispatch": {"hidden": "T H", "expert_ids": "T top_k"},
    "Fp8ExpertDispatch": {"hidden": "T H", "expert_ids": "T top_k"},
    "KVCacheUpdate": {"cache": "B G S D", "update": "B G T D"},
    "DecodeAttention": {"query": "B Q T D", "key": "B G S D"},
    "DeformableSample": {"value": "n S h D", "weights": "n Q h P"},
}


def symbols_of(op: str, tensors: Tensors, attributes: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, float]]:
    """The op's symbols, and its real numbers, from its inputs and attributes."""
    symbols = _dims(tensors, _LEGENDS[op])
    reals: dict[str, float] = {}
    if "experts" in attributes:
        mask = sum(1 << expert for expert in attributes["experts"])
        symbols |= {"n": len(attributes["experts"]), "I": tensors["gate_up"].shape[1] // 2}
        symbols |= {"experts": mask - (mask >> 63 << 64), "routes": symbols["T"] * symbols["top_k"]}
        if "group_size" in attributes:
            symbols["group_shift"] = attributes["group_size"].bit_length() - 1
    elif op == "KVCacheUpdate":
        symbols["rows"] = symbols["B"] * symbols["G"] * symbols["T"]
    elif op == "DecodeAttention":
        symbols |= {"heads": symbols["B"] * symbols["G"], "window": attributes.get("window", 0)}
        symbols["shared"] = symbols["Q"] // symbols["G"] * symbols["T"]
        symbols["out_rows"] = symbols["B"] * symbols["Q"] * symbols["T"]
        reals["scale"] = attributes.get("scale", 0.0) or 1 / math.sqrt(symbols["D"])
    return symbols, reals


def plan_for(op: str, tensors: Tensors, attributes: Mapping[str, Any]) -> tuple[Plan, dict[str, int], dict[str, float]]:
    """The plan that the shell would take, all symbols, and the real numbers."""
    symbols, reals = symbols_of(op, tensors, attributes)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    weights = ""
    if "experts" in attributes:
        fp8 = op == "Fp8ExpertDispatch"
        weights = f"int{attributes['bits']}" if "bits" in attributes else "fp8" if fp8 else dtype
    plan = choose(_PLANS, (op, dtype, weights), symbols)
    return plan, plan.derive(symbols), reals


def _launch(launch: Launch, values: Mapping[str, Any], symbols: Mapping[str, int], sm: int) -> None:
    kernel = launch.kernel
    module = importlib.import_module(f"moiie_plugins.kernels.{kernel.module}")
    tile = kernel.tile(sm)
    named = {}
    for argument in kernel.arguments:
        value = values[argument.binding]
        if argument.pointer and value.dtype == torch.int8 and argument.type == "int32":
            value = value.view(torch.int32)
        named[argument.name] = value
    grid = tuple(
        -(-symbols[symbol] // (tile.blocks[block] if isinstance(block, str) else block))
        for symbol, block in launch.grid
    )
    if 0 in grid:
        return
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    getattr(module, kernel.function)[grid](**named, **kernel.constants(sm), **options)


def run(
    op: str, tensors: Tensors, out: torch.Tensor | None, attributes: Mapping[str, Any], sm: int = 80
) -> Sequence[str]:
    """Runs an op, writing to `out` (KVCacheUpdate: to its cache).

    Args:
        op: its name.
        tensors: inputs by name, the first one first.
        out: the output.
        attributes: of the node.
        sm: whose tiles are used.

    Returns:
        The names of the kernels that were launched.
    """
    plan, symbols, reals = plan_for(op, tensors, attributes)
    values: dict[str, Any] = {**tensors, **symbols, **reals, "out": out}
    device = next(iter(tensors.values())).device
    for buffer in plan.workspace:
        dtype = getattr(torch, buffer.type)
        count = math.prod(symbols[dim] for dim in buffer.dims) * buffer.bytes // dtype.itemsize
        values[f"workspace.{buffer.name}"] = torch.empty(count, dtype=dtype, device=device)
    for launch in plan.launches:
        _launch(launch, values, symbols, sm)
    return [launch.kernel.name for launch in plan.launches]
