"""ExpertDispatch: each token through its k experts, weighted and summed (spec moiie.md, 1.7 step 6 and 1.10).

Shapes: T tokens, H hidden, I intermediate, k experts per token, n experts whose weights are given.
    hidden [T, H]; expert_ids [T, k] int32; expert_weights [T, k] float32;
    gate_up: n tensors [2I, H], rows [gate | up]; down: n tensors [H, I] -> out [T, H]
Attribute `experts`: the global id of each of the n experts, ascending. A route to any other id adds nothing: a decode
graph lists only the experts its tokens can reach, and the router never names another.

The experts come as one tensor each, not as a stack: a runtime that maps weights from a file must not slice them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.ops.op import Attributes, Op, Port, function_text, scalar, vector

Watch = Callable[[int, str, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Is shown an expert's id, its projection's name, the rows [n] routed there, and the projection's input and output."""


@torch.library.custom_op("moiie::expert_dispatch", mutates_args=())
def expert_dispatch(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    experts: list[int],
) -> torch.Tensor:
    """Weighted sum [T, H] of the chosen experts' SwiGLU outputs, experts visited in ascending id."""
    return run_experts(hidden, (expert_ids, expert_weights), gate_up, down, experts)


def run_experts(
    hidden: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor],
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    experts: list[int],
    watch: Watch | None = None,
) -> torch.Tensor:
    """The op itself. `routing`: expert_ids and expert_weights; `watch`: sees what goes through each projection."""
    expert_ids, expert_weights = routing
    out = torch.zeros_like(hidden)
    for expert, w_gate_up, w_down in zip(experts, gate_up, down, strict=True):
        rows, slots = torch.where(expert_ids == expert)
        inputs = hidden[rows]
        opened = F.linear(inputs, w_gate_up)
        gate, up = opened.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        closed = F.linear(inner, w_down)
        if watch is not None:
            watch(expert, "gate_up_proj", rows, inputs, opened)
            watch(expert, "down_proj", rows, inner, closed)
        out.index_add_(0, rows, closed * expert_weights[rows, slots].to(hidden.dtype).unsqueeze(1))
    return out


@expert_dispatch.register_fake
def _(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    experts: list[int],
) -> torch.Tensor:
    return torch.empty_like(hidden)


def expert_lines(index: int, expert: int, total: str, suffix: str = "") -> str:
    """Statements for one expert: gather the rows routed to it, run it, add its weighted rows to the sum so far.

    Args:
        index: its place among the node's experts.
        expert: its global id.
        total: name of the sum that holds its rows.
        suffix: behind the names of its weights `gate_up_<index>` and `down_<index>`.
    """
    return f"""{scalar(f"id_{index}", expert, "int32")}
    hit_{index} = Equal (expert_ids, id_{index})
    where_{index} = NonZero (hit_{index})
    rows_{index} = Gather <axis = 0> (where_{index}, zero)
    hits_{index} = Transpose <perm = [1, 0]> (where_{index})
    x_{index} = Gather <axis = 0> (hidden, rows_{index})
    opened_{index} = Gemm <transB = 1> (x_{index}, gate_up_{index}{suffix})
    gate_{index}, up_{index} = Split <axis = 1, num_outputs = 2> (opened_{index})
    sigmoid_{index} = Sigmoid (gate_{index})
    silu_{index} = Mul (gate_{index}, sigmoid_{index})
    act_{index} = Mul (silu_{index}, up_{index})
    y_{index} = Gemm <transB = 1> (act_{index}, down_{index}{suffix})
    weight_{index} = GatherND (expert_weights, hits_{index})
    column_{index} = Unsqueeze (weight_{index}, one)
    weighted_{index} = Mul (y_{index}, column_{index})
    targets_{index} = Unsqueeze (rows_{index}, one)
    {total} = ScatterND <reduction = "add"> (sum_{index}, targets_{index}, weighted_{index})"""


def _body(attributes: Attributes, _: int) -> str:
    experts = list(attributes["experts"])
    lines = scalar("zero", 0) + vector("one", [1])
    lines += """
    shape = Shape (hidden)
    sum_0 = ConstantOfShape <value = float[1] {0}> (shape)"""
    for index, expert in enumerate(experts):
        lines += expert_lines(index, expert, "out" if index + 1 == len(experts) else f"sum_{index + 1}")
    inputs = ["hidden", "expert_ids", "expert_weights"]
    inputs += [f"gate_up_{i}" for i in range(len(experts))] + [f"down_{i}" for i in range(len(experts))]
    return function_text("ExpertDispatch", (inputs, ["out"]), attributes, lines)


OP = Op(
    name="ExpertDispatch",
    torch_name="moiie::expert_dispatch",
    inputs=(
        Port("hidden", "tensor(float)"),
        Port("expert_ids", "tensor(int32)"),
        Port("expert_weights", "tensor(float)"),
        Port("banks", "tensor(float)", variadic=True),
    ),
    outputs=(Port("out", "tensor(float)"),),
    attributes={"experts": "ints"},
    body=_body,
    torch_arguments=("hidden", "expert_ids", "expert_weights", "gate_up", "down", "experts"),
)
