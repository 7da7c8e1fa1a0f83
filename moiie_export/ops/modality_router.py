"""ModalityRouter: one row of logits per token over all experts, -inf where its modality may not go.

Two gates and a modality mask become one router, so that everything after it is ordinary top-k routing
(spec moiie.md, 1.6 and Appendix A). Row g of a gate is not expert g: it is the g-th id of the modality's list.

Shapes: T tokens, H hidden, E experts, Gl / Gv experts a language / vision token may reach.
    hidden [T, H]; token_modality [T] int32, 1 = vision; w_language [Gl, H]; w_vision [Gv, H] -> logits [T, E]
Without w_vision (decode, or one gate for all tokens) every token is routed by w_language.
"""

from __future__ import annotations

import torch

from moiie_export.ops.op import Attributes, Op, Port, function_text, scalar, vector


@torch.library.custom_op("moiie::modality_router", mutates_args=())
def modality_router(
    hidden: torch.Tensor,
    w_language: torch.Tensor,
    token_modality: torch.Tensor | None,
    w_vision: torch.Tensor | None,
    language_experts: list[int],
    vision_experts: list[int],
    num_experts: int,
) -> torch.Tensor:
    """Router logits [T, E] in float32, -inf for experts the token's modality may not reach."""
    logits = _spread(hidden @ w_language.T, language_experts, num_experts)
    if w_vision is None or token_modality is None:
        return logits
    vision = _spread(hidden @ w_vision.T, vision_experts, num_experts)
    return torch.where((token_modality == 1).unsqueeze(1), vision, logits)


def _spread(logits: torch.Tensor, experts: list[int], num_experts: int) -> torch.Tensor:
    """[T, G] -> [T, E]: column g goes to expert experts[g]."""
    spread = logits.new_full((logits.shape[0], num_experts), -torch.inf, dtype=torch.float32)
    spread[:, experts] = logits.float()
    return spread


@modality_router.register_fake
def _(
    hidden: torch.Tensor,
    w_language: torch.Tensor,
    token_modality: torch.Tensor | None,
    w_vision: torch.Tensor | None,
    language_experts: list[int],
    vision_experts: list[int],
    num_experts: int,
) -> torch.Tensor:
    return hidden.new_empty((hidden.shape[0], num_experts), dtype=torch.float32)


def _spread_lines(gate: str, experts: list[int], num_experts: int) -> str:
    """Statements that place a gate's logits: a column of -inf is appended and gathered where no gate row goes."""
    columns = [experts.index(e) if e in experts else len(experts) for e in range(num_experts)]
    return f"""{vector(f"{gate}_columns", columns)}
    {gate}_logits = Gemm <transB = 1> (hidden, w_{gate})
    {gate}_padded = Concat <axis = 1> ({gate}_logits, nowhere)
    {gate} = Gather <axis = 1> ({gate}_padded, {gate}_columns)"""


def _body(attributes: Attributes, input_count: int) -> str:
    count = attributes["num_experts"]
    lines = vector("one", [1])
    lines += """
    lowest = Constant <value = float {-inf}> ()
    tokens = Shape <start = 0, end = 1> (hidden)
    column = Concat <axis = 0> (tokens, one)
    nowhere = Expand (lowest, column)"""
    lines += _spread_lines("language", list(attributes["language_experts"]), count)
    inputs = ["hidden", "w_language"]
    if input_count > 2:
        inputs += ["token_modality", "w_vision"]
        lines += _spread_lines("vision", list(attributes["vision_experts"]), count)
        lines += scalar("is_vision_type", 1, "int32")
        lines += """
    is_vision = Equal (token_modality, is_vision_type)
    is_vision_column = Unsqueeze (is_vision, one)
    logits = Where (is_vision_column, vision, language)"""
    else:
        lines += "\n    logits = Identity (language)"
    return function_text("ModalityRouter", (inputs, ["logits"]), attributes, lines)


OP = Op(
    name="ModalityRouter",
    torch_name="moiie::modality_router",
    inputs=(
        Port("hidden", "tensor(float)"),
        Port("w_language", "tensor(float)"),
        Port("token_modality", "tensor(int32)", optional=True),
        Port("w_vision", "tensor(float)", optional=True),
    ),
    outputs=(Port("logits", "tensor(float)"),),
    attributes={"language_experts": "ints", "vision_experts": "ints", "num_experts": "int"},
    body=_body,
    torch_arguments=(
        "hidden",
        "w_language",
        "token_modality",
        "w_vision",
        "language_experts",
        "vision_experts",
        "num_experts",
    ),
)
