"""AdapterDispatch: the adapters a request was given, beside a feed-forward network (spec mome.md, 1.3 and equation 8).

Shapes: B rows of T tokens, H hidden, b bottleneck, A adapters: one a row, or a single one that all rows share.
    hidden [B, T, H]; down [A, b, H]; down_bias [A, b]; up [A, H, b]; up_bias [A, H]; scale [A] -> delta [B, T, H]
    delta = scale * (up relu(down x + down_bias) + up_bias)
Which adapter a request gets is decided once, before the first token, by the instance router: the op sees the chosen ones
alone, with gain 1 (spec 6.3).

Weights stand on the left of their products, so that a runtime which maps them from a file transposes activations only.
"""

from __future__ import annotations

import torch

from moiie_export.ops.op import Attributes, Op, Port, function_text, vector


@torch.library.custom_op("moiie::adapter_dispatch", mutates_args=())
def adapter_dispatch(
    hidden: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """What the adapters add [B, T, H].

    Raises:
        ValueError: there are neither as many adapters as rows nor one.
    """
    if down.shape[0] not in (1, hidden.shape[0]):
        raise ValueError(f"{down.shape[0]} adapters for {hidden.shape[0]} rows: give one a row, or one for all")
    inner = torch.relu(hidden @ down.transpose(1, 2) + down_bias.unsqueeze(1))
    return (inner @ up.transpose(1, 2) + up_bias.unsqueeze(1)) * scale.view(-1, 1, 1)


@adapter_dispatch.register_fake
def _(
    hidden: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(hidden)


_LINES = """
    columns = Transpose <perm = [0, 2, 1]> (hidden)
    lowered = MatMul (down, columns)
    down_column = Unsqueeze (down_bias, last)
    inner = Add (lowered, down_column)
    active = Relu (inner)
    raised = MatMul (up, active)
    up_column = Unsqueeze (up_bias, last)
    outer = Add (raised, up_column)
    gain = Unsqueeze (scale, token_axes)
    scaled = Mul (outer, gain)
    delta = Transpose <perm = [0, 2, 1]> (scaled)"""


def _body(attributes: Attributes, _: int) -> str:
    lines = vector("last", [-1]) + vector("token_axes", [1, 2]) + _LINES
    inputs = ["hidden", "down", "down_bias", "up", "up_bias", "scale"]
    return function_text("AdapterDispatch", (inputs, ["delta"]), attributes, lines)


OP = Op(
    name="AdapterDispatch",
    torch_name="moiie::adapter_dispatch",
    inputs=(
        Port("hidden", "tensor(float)"),
        Port("down", "tensor(float)"),
        Port("down_bias", "tensor(float)"),
        Port("up", "tensor(float)"),
        Port("up_bias", "tensor(float)"),
        Port("scale", "tensor(float)"),
    ),
    outputs=(Port("delta", "tensor(float)"),),
    attributes={},
    body=_body,
    torch_arguments=("hidden", "down", "down_bias", "up", "up_bias", "scale"),
)
