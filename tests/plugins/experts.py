"""Expert banks for tests and measurements of the kernels, with what the op's reference makes of them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moiie_export.ops.expert_dispatch import expert_dispatch


def quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored values, float16 scales, and the float32 weight that they stand for; every value that fits occurs."""
    rows = weight.float().unflatten(-1, (-1, group))
    scales = (rows.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)).half()
    values = (rows / scales.float().unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    meant = (values * scales.float().unsqueeze(-1)).flatten(-2)
    stored = values.flatten(-2).to(torch.int8)
    if bits == 4:
        stored = (stored[..., 0::2] & 15) | (stored[..., 1::2] << 4)
    return stored, scales, meant


def float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored E4M3 numbers, a float32 scale per row, and the float32 weight that they stand for."""
    scales = weight.float().abs().amax(dim=-1) / torch.finfo(torch.float8_e4m3fn).max
    stored = (weight.float() / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * scales.unsqueeze(-1)


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer's experts and how a bank of them is stored; `experts`: the ids that the bank holds.

    `group`: columns that share a scale; 0 with 8 bits: E4M3 numbers, a scale per row.
    """

    hidden: int
    intermediate: int
    experts: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    bits: int = 16
    group: int = 32


@dataclass
class Case:
    """One call of the op: inputs, attributes, and the weights that the bank stands for."""

    op: str
    tensors: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    meant: tuple[torch.Tensor, torch.Tensor] = field(repr=False)

    def expected(self) -> torch.Tensor:
        """The reference's result in float64."""
        hidden = self.tensors["hidden"].double()
        gate_up, down = (bank.double() for bank in self.meant)
        ids, shares = self.tensors["expert_ids"], self.tensors["expert_weights"].double()
        experts = list(self.attributes["experts"])
        result: torch.Tensor = expert_dispatch(hidden, ids, shares, list(gate_up), list(down), experts)
        return result


def make_case(layer: Layer, ids: torch.Tensor, seed: int = 0) -> Case:
    """Random tokens, weights and shares for the routes `ids` [T, top_k], on the device of `ids`."""
    random = torch.Generator(ids.device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=ids.device)

    count, hidden, intermediate = len(layer.experts), layer.hidden, layer.intermediate
    banks = {
        "gate_up": normal(count, 2 * intermediate, hidden) * hidden**-0.5,
        "down": normal(count, hidden, intermediate) * intermediate**-0.5,
    }
    shares = torch.rand(ids.shape, generator=random, device=ids.device) + 0.25
    tensors = {
        "hidden": normal(ids.shape[0], hidden).to(layer.dtype),
        "expert_ids": ids.to(torch.int32),
        "expert_weights": shares,
    }
    attributes: dict[str, Any] = {"experts": layer.experts}
    if layer.bits == 16:
        stored = {name: bank.to(layer.dtype) for name, bank in banks.items()}
        return Case("ExpertDispatch", {**tensors, **stored}, attributes, (stored["gate_up"], stored["down"]))
    found = {
        name: quantize(bank, layer.bits, layer.group) if layer.group else float8(bank) for name, bank in banks.items()
    }
    tensors |= {name: stored for name, (stored, _, _) in found.items()}
    tensors |= {f"{name}_scales": scales for name, (_, scales, _) in found.items()}
    attributes |= {"bits": layer.bits, "group_size": layer.group} if layer.group else {}
    op = "QuantizedExpertDispatch" if layer.group else "Fp8ExpertDispatch"
    return Case(op, tensors, attributes, (found["gate_up"][2], found["down"][2]))


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2.5e-2}
"""Of an error relative to the largest value: a few roundings of the type. The interpreter cuts bfloat16 off instead."""


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error over the largest expected value; infinite where a result is not finite."""
    if not torch.isfinite(result).all():
        return float("inf")
    return float((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
