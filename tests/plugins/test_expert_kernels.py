"""The expert kernels in Triton's interpreter against the op's reference in float64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.experts import TOLERANCE, Case, Layer, make_case, relative_error
from tests.plugins.interpreter import needs_triton

pytestmark = needs_triton

F16, BF16 = torch.float16, torch.bfloat16
FOUR = (0, 1, 2, 3)


def random_ids(tokens: int, top_k: int, experts: tuple[int, ...]) -> torch.Tensor:
    """Different random experts for each token."""
    scores = torch.rand(tokens, len(experts), generator=torch.Generator().manual_seed(tokens))
    return torch.tensor(experts)[scores.topk(top_k).indices]


def check(case: Case, kernels: int, sm: int = 80) -> None:
    from moiie_plugins.run import run

    hidden = case.tensors["hidden"]
    out = torch.full_like(hidden, float("nan"))
    assert len(run(case.op, case.tensors, out, case.attributes, sm)) == kernels
    assert relative_error(out, case.expected()) <= TOLERANCE[hidden.dtype]


@pytest.mark.parametrize(
    ("layer", "tokens", "top_k"),
    [
        pytest.param(Layer(48, 16, FOUR), 3, 2, id="float16"),
        pytest.param(Layer(32, 16, FOUR, BF16), 2, 3, id="bfloat16"),
        pytest.param(Layer(37, 9, FOUR), 2, 2, id="odd-sizes"),
        pytest.param(Layer(520, 16, (5, 9)), 1, 1, id="several-steps"),
        pytest.param(Layer(64, 32, FOUR, F16, 8, 32), 1, 2, id="int8"),
        pytest.param(Layer(64, 32, FOUR, BF16, 4, 32), 1, 2, id="int4-bfloat16"),
        pytest.param(Layer(48, 16, FOUR, F16, 8, 0), 2, 2, id="fp8"),
        pytest.param(Layer(37, 9, FOUR, BF16, 8, 0), 2, 2, id="fp8-odd-sizes-bfloat16"),
        pytest.param(Layer(520, 16, (5, 9), F16, 8, 0), 1, 1, id="fp8-several-steps"),
    ],
)
def test_decode(layer: Layer, tokens: int, top_k: int) -> None:
    check(make_case(layer, random_ids(tokens, top_k, layer.experts)), kernels=2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("group", "hidden", "intermediate"), [(32, 96, 64), (64, 64, 192), (128, 128, 128)])
def test_decode_groups_in_several_steps(
    bits: int, group: int, hidden: int, intermediate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 64 columns: rows are walked in steps, of which the last may be half full."""
    from moiie_plugins import tiles

    small = tiles.Tile({"BLOCK_N": 32, "BLOCK_K": 64}, 4)
    monkeypatch.setattr(tiles, "_DECODE", dict.fromkeys(tiles._DECODE, small))
    check(make_case(Layer(hidden, intermediate, FOUR, F16, bits, group), random_ids(1, 2, FOUR)), kernels=2)


@pytest.mark.parametrize(
    ("layer", "tokens", "top_k", "sm"),
    [
        pytest.param(Layer(48, 32, FOUR), 20, 2, 80, id="float16"),
        pytest.param(Layer(80, 16, FOUR, BF16), 7, 3, 90, id="bfloat16-wide"),
        pytest.param(Layer(75, 19, FOUR), 20, 1, 80, id="odd-sizes"),
        pytest.param(Layer(64, 96, FOUR, F16, 8, 32), 20, 2, 80, id="int8-32"),
        pytest.param(Layer(128, 64, FOUR, BF16, 8, 64), 20, 2, 90, id="int8-64-bfloat16-wide"),
        pytest.param(Layer(96, 64, FOUR, F16, 4, 32), 20, 2, 80, id="int4-32"),
        pytest.param(Layer(128, 64, FOUR, BF16, 4, 64), 20, 2, 90, id="int4-64-bfloat16-wide"),
        pytest.param(Layer(128, 128, FOUR, F16, 4, 128), 20, 2, 80, id="int4-128"),
        pytest.param(Layer(75, 19, FOUR, F16, 8, 0), 20, 1, 89, id="fp8-odd-sizes"),
        pytest.param(Layer(80, 32, FOUR, BF16, 8, 0), 9, 2, 90, id="fp8-bfloat16-wide"),
    ],
)
def test_prefill(layer: Layer, tokens: int, top_k: int, sm: int) -> None:
    check(make_case(layer, random_ids(tokens, top_k, layer.experts)), kernels=4, sm=sm)


@pytest.mark.parametrize("layer", [Layer(32, 16, FOUR), Layer(32, 16, FOUR, F16, 8, 0)], ids=["float16", "fp8"])
def test_prefill_where_an_expert_has_no_rows_and_another_has_several_blocks(layer: Layer) -> None:
    ids = torch.full((150, 1), 2)
    ids[140:] = 0
    check(make_case(layer, ids), kernels=4)


@pytest.mark.parametrize(("bits", "group"), [(16, 0), (8, 0)], ids=["float16", "fp8"])
@pytest.mark.parametrize(("tokens", "kernels"), [(2, 2), (12, 4)], ids=["decode", "prefill"])
def test_routes_to_experts_of_other_banks_add_nothing(tokens: int, kernels: int, bits: int, group: int) -> None:
    """A bank holds 1 and 63 of the ids; a negative id is a route to nowhere. The first token has no expert here."""
    ids = random_ids(tokens, 2, (0, 1, 2, 62, 63))
    ids[0] = torch.tensor([-1, 62])
    ids[1] = torch.tensor([63, 1])
    case = make_case(Layer(32, 16, (1, 63), F16, bits, group), ids)
    assert not case.expected()[0].any()
    check(case, kernels)


@pytest.mark.parametrize("tokens", [1, 17], ids=["decode", "prefill"])
def test_every_e4m3_number_is_itself(tokens: int) -> None:
    """A column of weights that holds all finite ones, subnormal ones too; the others are zero."""
    from moiie_plugins.run import run

    finite = torch.tensor([bits for bits in range(256) if bits & 0x7F != 0x7F], dtype=torch.uint8)
    case = make_case(Layer(finite.numel(), 16, (0,), F16, 8, 0), torch.zeros(tokens, 1, dtype=torch.int64))
    case.tensors["down"].zero_()[0, :, 3] = finite.view(torch.float8_e4m3fn)
    case.meant[1].copy_(case.tensors["down"].float() * case.tensors["down_scales"].unsqueeze(-1))
    scale = case.expected().abs().amax(dim=1, keepdim=True) / 448
    case.tensors["expert_weights"] /= scale.float()
    out = torch.full_like(case.tensors["hidden"], float("nan"))
    run(case.op, case.tensors, out, case.attributes, sm=89)
    torch.testing.assert_close(out.double(), case.expected(), rtol=4e-3, atol=0)


def test_as_many_experts_as_there_may_be() -> None:
    every = tuple(range(64))
    check(make_case(Layer(16, 16, every), random_ids(6, 3, every)), kernels=4)


def test_sixteen_routes_decode_and_seventeen_prefill() -> None:
    from moiie_plugins.run import plan_for

    layer = Layer(32, 16, FOUR)
    for tokens, kernels in ((16, 2), (17, 4)):
        case = make_case(layer, random_ids(tokens, 1, FOUR))
        assert len(plan_for(case.op, case.tensors, case.attributes)[0].launches) == kernels


def test_prefill_gives_the_same_bits_twice() -> None:
    from moiie_plugins.run import run

    case = make_case(Layer(32, 16, FOUR), random_ids(9, 2, FOUR))
    first, second = torch.empty(2, 9, 32, dtype=F16)
    for out in (first, second):
        run(case.op, case.tensors, out, case.attributes)
    assert torch.equal(first, second)
