"""QuantizedLinear: a linear layer whose weight is stored in few bits (layouts: quantize/packing.py).

Shapes: T rows, K input and N output features, g columns per scale.
    x [T, K]; scales [N, K/g] float16 or float32, or [N] with one scale per row -> y [T, N]
    q: int4 [N, K] (in torch two a byte, int8 [N, K/2], low nibble = even column), int8 [N, K] or float8 E4M3 [N, K]
    input_scale [1]: when given, x is rounded to int8 with this scale first (w8a8)
Attributes: `bits` of a stored number; `group_size` g, 0 with one scale per row.
    y = x W^T, W = q * scale in float32
A bias is an Add behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.ops.op import Attributes, Op, Port, function_text


@torch.library.custom_op("moiie::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """The linear layer [T, N] on the numbers that q and scales stand for."""
    if input_scale is not None:
        x = (x / input_scale).round().clamp(-128, 127) * input_scale
    return F.linear(x, dequantized(q, scales, bits, group_size))


@quantized_linear.register_fake
def _(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], q.shape[0]))


def dequantized(q: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The weight [N, K] in float32 that stored numbers and scales stand for."""
    if bits == 4:
        q = torch.stack(((q << 4) >> 4, q >> 4), dim=-1).flatten(-2)
    columns = group_size or q.shape[-1]
    grouped = q.float().view(q.shape[0], -1, columns) * scales.float().view(q.shape[0], -1, 1)
    return grouped.view(q.shape)


def dequantize_lines(weight: str, q: str, scales: str, group_size: int) -> str:
    """Statements that make `weight` from two inputs; scales become float32 first, so that every product is exact."""
    blocks = f"<axis = -1, block_size = {group_size}>" if group_size else "<axis = 0>"
    return f"""
    {weight}_scales = Cast <to = 1> ({scales})
    {weight} = DequantizeLinear {blocks} ({q}, {weight}_scales)"""


_ROUNDING = """
    lowest = Constant <value = float {-128}> ()
    highest = Constant <value = float {127}> ()
    steps = Div (x, input_scale)
    whole = Round (steps)
    bounded = Clip (whole, lowest, highest)
    rounded = Mul (bounded, input_scale)"""
"""Not QuantizeLinear: no ONNX Runtime for Python 3.10 has that of opset 23. A TensorRT dialect writes it instead."""


def _body(attributes: Attributes, input_count: int) -> str:
    lines = dequantize_lines("weight", "q", "scales", attributes["group_size"])
    inputs, rows = ["x", "q", "scales"], "x"
    if input_count > 3:
        inputs, rows = [*inputs, "input_scale"], "rounded"
        lines += _ROUNDING
    lines += f"\n    y = Gemm <transB = 1> ({rows}, weight)"
    return function_text("QuantizedLinear", (inputs, ["y"]), attributes, lines)


OP = Op(
    name="QuantizedLinear",
    torch_name="moiie::quantized_linear",
    inputs=(
        Port("x", "tensor(float)"),
        Port("q", "tensor(int4)|tensor(int8)|tensor(float8e4m3fn)"),
        Port("scales", "tensor(float16)|tensor(float)"),
        Port("input_scale", "tensor(float)", optional=True),
    ),
    outputs=(Port("y", "tensor(float)"),),
    attributes={"bits": "int", "group_size": "int"},
    body=_body,
    torch_arguments=("x", "q", "scales", "input_scale", "bits", "group_size"),
)
