"""Nodes of every op with tensors to drive them: values for the inputs, and what the output must be, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.plugins.cpp.shell import Node, Tensor

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """One node.

    Attributes:
        op: its name.
        attributes: lists of whole numbers, or one real number.
        inputs: name -> value, in order.
        output: name of the output; that of an input where it is updated in place.
        shape: its shape; its type is that of the first input.
        expected: what the output must be.
        kernels: functions that must have been launched, in order.
        tolerance: largest allowed difference, relative to the largest expected value.
    """

    op: str
    attributes: Mapping[str, Sequence[int] | float]
    inputs: Tensors
    output: str
    shape: Sequence[int]
    expected: torch.Tensor
    kernels: tuple[str, ...]
    tolerance: float = 2e-3

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return next(iter(self.inputs.values())).dtype

    def node(self, offsets: Mapping[str, int] | None = None, most: Mapping[str, Sequence[int]] | None = None) -> Node:
        """The node, its tensors at those offsets (`output`: the output's, if it is no input's), with those largest dims."""
        where, bound = offsets or {}, most or {}
        inputs = [
            Tensor(value.dtype, value.shape, where.get(name, 0), bound.get(name)) for name, value in self.inputs.items()
        ]
        output = Tensor(self.dtype, self.shape, where.get("output", where.get(self.output, 0)), bound.get(self.output))
        return Node(self.op, self.attributes, inputs, [output])


def _experts_in(tensors: Tensors, gate_up: torch.Tensor, down: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    hidden = tensors["hidden"].double()
    out = torch.zeros_like(hidden)
    for token, (ids, weights) in enumerate(zip(tensors["expert_ids"], tensors["expert_weights"], strict=True)):
        for expert, weight in zip(ids.tolist(), weights.double(), strict=True):
            if expert in experts:
                row = list(experts).index(expert)
                gate, up = (gate_up[row].double() @ hidden[token]).chunk(2)
                out[token] += weight * (down[row].double() @ (torch.nn.functional.silu(gate) * up))
    return out


def _routed(tokens: int, top_k: int, width: int, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(tokens * 1000 + width)
    return {
        "hidden": torch.randn(tokens, width).half(),
        "expert_ids": torch.tensor(ids, dtype=torch.int32)[torch.randint(len(ids), (tokens, top_k))],
        "expert_weights": torch.rand(tokens, top_k),
    }


DECODE = ("expert_decode_gate_up", "expert_decode_down")
PREFILL = ("expert_route", "expert_prefill_gate_up", "expert_prefill_down", "expert_combine")


def experts(tokens: int, width: int, inner: int, kernels: tuple[str, ...]) -> Example:
    """ExpertDispatch in float16 with a bank of experts 0, 2, 3 and 63; tokens also go to expert 5, which it lacks."""
    held = [0, 2, 3, 63]
    inputs = _routed(tokens, 2, width, [*held, 5])
    inputs["gate_up"] = (torch.randn(4, 2 * inner, width) / math.sqrt(width)).half()
    inputs["down"] = (torch.randn(4, width, inner) / math.sqrt(inner)).half()
    expected = _experts_in(inputs, inputs["gate_up"], inputs["down"], held)
    return Example("ExpertDispatch", {"experts": held}, inputs, "out", (tokens, width), expected, kernels)


def quantized_experts(bits: int, group: int, tokens: int, kernels: tuple[str, ...]) -> Example:
    """QuantizedExpertDispatch with experts 1 and 4; values and scales are drawn, not computed from weights."""
    held, width, inner = [1, 4], 2 * group, group
    inputs = _routed(tokens, 2, width, held)
    limit = 1 << (bits - 1)
    values, scales, whole = {}, {}, {}
    for name, shape in {"gate_up": (2, 2 * inner, width), "down": (2, width, inner)}.items():
        drawn = torch.randint(-limit, limit, shape)
        low, high = drawn[..., 0::2] & 15, drawn[..., 1::2] & 15
        values[name] = (drawn if bits == 8 else low | high << 4).to(torch.uint8).view(torch.int8)
        scales[f"{name}_scales"] = (torch.rand(*shape[:-1], shape[-1] // group) / limit / math.sqrt(shape[-1])).half()
        whole[name] = drawn.double() * scales[f"{name}_scales"].double().repeat_interleave(group, dim=-1)
    inputs |= {**values, **scales}
    expected = _experts_in(inputs, whole["gate_up"], whole["down"], held)
    attributes = {"experts": held, "bits": [bits], "group_size": [group]}
    return Example("QuantizedExpertDispatch", attributes, inputs, "out", (tokens, width), expected, kernels)


def fp8_experts(tokens: int, width: int, inner: int, kernels: tuple[str, ...]) -> Example:
    """Fp8ExpertDispatch with experts 1 and 4; every finite E4M3 number may be drawn."""
    held = [1, 4]
    inputs = _routed(tokens, 2, width, held)
    values, scales, whole = {}, {}, {}
    for name, shape in {"gate_up": (2, 2 * inner, width), "down": (2, width, inner)}.items():
        bits = torch.randint(0, 0x7F, shape) | torch.randint(0, 2, shape) << 7
        values[name] = bits.to(torch.uint8).view(torch.float8_e4m3fn)
        scales[f"{name}_scales"] = (torch.rand(shape[:-1]) + 0.5) / 100 / math.sqrt(shape[-1])
        whole[name] = values[name].double() * scales[f"{name}_scales"].double().unsqueeze(-1)
    inputs |= {**values, **scales}
    expected = _experts_in(inputs, whole["gate_up"], whole["down"], held)
    return Example("Fp8ExpertDispatch", {"experts": held}, inputs, "out", (tokens, width), expected, kernels)


def cache_update() -> Example:
    """KVCacheUpdate of 3 tokens; the second row's last token lies behind the buffer's end."""
    torch.manual_seed(5)
    cache, update = torch.randn(2, 2, 8, 24).half(), torch.randn(2, 2, 3, 24).half()
    past = torch.tensor([2, 6], dtype=torch.int32)
    expected = cache.double()
    expected[0, :, 2:5] = update[0].double()
    expected[1, :, 6:8] = update[1, :, :2].double()
    inputs = {"cache": cache, "update": update, "past_lengths": past}
    return Example("KVCacheUpdate", {}, inputs, "cache", cache.shape, expected, ("kv_cache_update",), 0.0)


def attention(window: int, scale: float) -> Example:
    """DecodeAttention of 2 tokens with grouped heads over 300 slots; what was never written is NaN."""
    torch.manual_seed(window + 1)
    query = torch.randn(2, 4, 2, 40).half()
    past = [290, 17]
    key, value = torch.randn(2, 2, 300, 40).half(), torch.randn(2, 2, 300, 40).half()
    for row, length in enumerate(past):
        key[row, :, length + 2 :] = value[row, :, length + 2 :] = torch.nan
    expected = torch.zeros(2, 4, 2, 40, dtype=torch.float64)
    for row, length in enumerate(past):
        for head in range(4):
            for token in range(2):
                last = length + token + 1
                first = max(0, last - window) if window else 0
                keys, values = (each[row, head // 2, first:last].double() for each in (key, value))
                scores = keys @ query[row, head, token].double() * (scale or 1 / math.sqrt(40))
                expected[row, head, token] = scores.softmax(dim=0) @ values
    inputs = {"query": query, "key": key, "value": value, "past_lengths": torch.tensor(past, dtype=torch.int32)}
    kernels = ("decode_attention_split", "decode_attention_merge")
    attributes: dict[str, Sequence[int] | float] = {"window": [window], "scale": scale}
    return Example("DecodeAttention", attributes, inputs, "out", query.shape, expected, kernels)


def samples(dtype: torch.dtype) -> Example:
    """DeformableSample of two maps of different grids; some points lie outside."""
    from moiie_export.ops.deformable_sample import deformable_sample

    torch.manual_seed(9)
    value, points = torch.randn(2, 20, 3, 12).to(dtype), torch.rand(2, 5, 3, 4, 2) * 7 - 1
    weights, grid = torch.rand(2, 5, 3, 4), torch.tensor([[5.0, 4.0], [3.0, 2.0]])
    expected = deformable_sample(value.double(), points.double(), weights.double(), grid.double())
    inputs = {"value": value, "points": points, "weights": weights, "grid_size": grid}
    return Example("DeformableSample", {}, inputs, "out", (2, 5, 36), expected, ("deformable_sample",))


EXAMPLES: dict[str, Callable[[], Example]] = {
    "decode": lambda: experts(3, 64, 48, DECODE),
    "decode, most routes": lambda: experts(8, 32, 16, DECODE),
    "decode, odd sizes": lambda: experts(1, 40, 24, DECODE),
    "prefill": lambda: experts(70, 64, 48, PREFILL),
    "prefill, fewest routes, odd sizes": lambda: experts(9, 40, 24, PREFILL),
    "decode, int4 of 32": lambda: quantized_experts(4, 32, 2, DECODE),
    "decode, int8 of 64": lambda: quantized_experts(8, 64, 1, DECODE),
    "prefill, int4 of 128": lambda: quantized_experts(4, 128, 9, PREFILL),
    "prefill, int8 of 32": lambda: quantized_experts(8, 32, 12, PREFILL),
    "decode, fp8": lambda: fp8_experts(2, 64, 48, DECODE),
    "prefill, fp8, odd sizes": lambda: fp8_experts(9, 40, 24, PREFILL),
    "cache": cache_update,
    "attention": lambda: attention(0, 0.0),
    "attention, window": lambda: attention(20, 0.25),
    "samples, float32": lambda: samples(torch.float32),
    "samples, float16": lambda: samples(torch.float16),
}
