"""QuantizedExpertDispatch: ExpertDispatch over experts that are stored in few bits (layouts: quantize/packing.py).

Shapes as in ExpertDispatch: T tokens, H hidden, I intermediate, k experts per token, n experts whose weights are given.
    hidden [T, H]; expert_ids [T, k] int32; expert_weights [T, k] float32; banks -> out [T, H]
    banks, 4n tensors or fewer: n gate_up [2I, H], rows [gate | up]; n down [H, I]; then the scales of those that have
    some, first of the gate_ups, then of the downs. int4 and int8 weights have scales [N, K/g] float16, float8 E4M3 ones
    [N] float32, float32 ones none.
Attributes: `experts` as in ExpertDispatch; per expert `gate_up_bits` and `down_bits`, 4, 8 or 32 (float32, no scales);
    `gate_up_group_sizes` and `down_group_sizes`, columns per scale, 0 for E4M3 (8 bits) and for float32. Experts need not
    agree in any of them.
"""

from __future__ import annotations

import torch

from moiie_export.ops.expert_dispatch import expert_lines, run_experts
from moiie_export.ops.op import Attributes, Op, Port, function_text, scalar, vector
from moiie_export.ops.quantized_linear import dequantize_lines, dequantized

PLAIN_BITS = 32
"""Of an expert whose weight is float32 and has no scales."""

KINDS = ("gate_up", "down")


def bank_names(attributes: Attributes) -> list[str]:
    """Names of the banks in the order of the node's inputs: gate_up_0, ..., down_0, ..., gate_up_scales_0, ..."""
    count = len(attributes["experts"])
    weights = [f"{kind}_{i}" for kind in KINDS for i in range(count)]
    scales = [
        f"{kind}_scales_{i}" for kind in KINDS for i, bits in enumerate(attributes[f"{kind}_bits"]) if bits < PLAIN_BITS
    ]
    return weights + scales


@torch.library.custom_op("moiie::quantized_expert_dispatch", mutates_args=())
def quantized_expert_dispatch(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    banks: list[torch.Tensor],
    experts: list[int],
    gate_up_bits: list[int],
    gate_up_group_sizes: list[int],
    down_bits: list[int],
    down_group_sizes: list[int],
) -> torch.Tensor:
    """Weighted sum [T, H] of the chosen experts' SwiGLU outputs on the weights that the banks stand for."""
    sizes = {"gate_up": gate_up_group_sizes, "down": down_group_sizes}
    bits = {"gate_up": gate_up_bits, "down": down_bits}
    names = bank_names({"experts": experts, "gate_up_bits": gate_up_bits, "down_bits": down_bits})
    given = dict(zip(names, banks, strict=True))
    weights = {
        kind: [
            dequantized(given[f"{kind}_{i}"], given[f"{kind}_scales_{i}"], bits[kind][i], sizes[kind][i])
            if bits[kind][i] < PLAIN_BITS
            else given[f"{kind}_{i}"]
            for i in range(len(experts))
        ]
        for kind in KINDS
    }
    return run_experts(hidden, (expert_ids, expert_weights), weights["gate_up"], weights["down"], experts)


@quantized_expert_dispatch.register_fake
def _(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    banks: list[torch.Tensor],
    experts: list[int],
    gate_up_bits: list[int],
    gate_up_group_sizes: list[int],
    down_bits: list[int],
    down_group_sizes: list[int],
) -> torch.Tensor:
    return torch.empty_like(hidden)


def _body(attributes: Attributes, _: int) -> str:
    experts = list(attributes["experts"])
    lines = scalar("zero", 0) + vector("one", [1])
    lines += """
    shape = Shape (hidden)
    sum_0 = ConstantOfShape <value = float[1] {0}> (shape)"""
    for index, expert in enumerate(experts):
        for kind in KINDS:
            lines += _weight_lines(f"{kind}_{index}", f"{kind}_scales_{index}", attributes, kind)
        total = "out" if index + 1 == len(experts) else f"sum_{index + 1}"
        lines += expert_lines(index, expert, total, suffix="_weight")
    inputs = ["hidden", "expert_ids", "expert_weights", *bank_names(attributes)]
    return function_text("QuantizedExpertDispatch", (inputs, ["out"]), attributes, lines)


def _weight_lines(bank: str, scales: str, attributes: Attributes, kind: str) -> str:
    """Statements that make `<bank>_weight` from a bank."""
    index = int(bank.rpartition("_")[2])
    if attributes[f"{kind}_bits"][index] == PLAIN_BITS:
        return f"\n    {bank}_weight = Identity ({bank})"
    return dequantize_lines(f"{bank}_weight", bank, scales, attributes[f"{kind}_group_sizes"][index])


OP = Op(
    name="QuantizedExpertDispatch",
    torch_name="moiie::quantized_expert_dispatch",
    inputs=(
        Port("hidden", "tensor(float)"),
        Port("expert_ids", "tensor(int32)"),
        Port("expert_weights", "tensor(float)"),
        Port("banks", "tensor(int4)|tensor(int8)|tensor(float8e4m3fn)|tensor(float16)|tensor(float)", variadic=True),
    ),
    outputs=(Port("out", "tensor(float)"),),
    attributes={
        "experts": "ints",
        "gate_up_bits": "ints",
        "gate_up_group_sizes": "ints",
        "down_bits": "ints",
        "down_group_sizes": "ints",
    },
    body=_body,
    torch_arguments=(
        "hidden",
        "expert_ids",
        "expert_weights",
        "banks",
        "experts",
        "gate_up_bits",
        "gate_up_group_sizes",
        "down_bits",
        "down_group_sizes",
    ),
)
