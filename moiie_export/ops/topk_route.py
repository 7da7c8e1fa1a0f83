"""TopKRoute: router logits -> the experts of each token and their weights (spec moiie.md, 1.7).

Shapes: T tokens, E experts, k experts per token.
    logits [T, E] float32, -inf where the token's modality may not go
    -> expert_ids [T, k] int32, falling by probability; expert_weights [T, k] float32, summing to 1
"""

from __future__ import annotations

import torch

from moiie_export.ops.op import Attributes, Op, Port, function_text, vector


@torch.library.custom_op("moiie::topk_route", mutates_args=())
def topk_route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in float32, top-k, renormalise.

    The choice is made among logits, whose order is that of the probabilities: where all but one probability underflow
    to 0, an expert at -inf would tie with the reachable ones.
    """
    ids = logits.topk(top_k, dim=-1).indices
    weights = logits.float().softmax(dim=-1).gather(-1, ids)
    return ids.to(torch.int32), weights / weights.sum(dim=-1, keepdim=True)


@topk_route.register_fake
def _(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def _body(attributes: Attributes, _: int) -> str:
    lines = vector("k", [attributes["top_k"]]) + vector("last", [-1])
    lines += """
    probabilities = Softmax <axis = -1> (logits)
    highest, ids = TopK <axis = -1, largest = 1, sorted = 1> (logits, k)
    chosen = GatherElements <axis = -1> (probabilities, ids)
    total = ReduceSum <keepdims = 1> (chosen, last)
    expert_weights = Div (chosen, total)
    expert_ids = Cast <to = 6> (ids)"""
    return function_text("TopKRoute", (["logits"], ["expert_ids", "expert_weights"]), attributes, lines)


OP = Op(
    name="TopKRoute",
    torch_name="moiie::topk_route",
    inputs=(Port("logits", "tensor(float)"),),
    outputs=(Port("expert_ids", "tensor(int32)"), Port("expert_weights", "tensor(float)")),
    attributes={"top_k": "int"},
    body=_body,
    torch_arguments=("logits", "top_k"),
)
