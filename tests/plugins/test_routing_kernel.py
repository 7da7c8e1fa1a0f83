"""expert_route: routed rows in blocks of one expert each."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.interpreter import needs_triton

pytestmark = needs_triton

BLOCK = 128


def routed(ids: torch.Tensor, experts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    from moiie_plugins.kernels.routing import expert_route

    blocks = (ids.numel() + len(experts) * (BLOCK - 1)) // BLOCK
    order = torch.full((blocks * BLOCK,), -7, dtype=torch.int32)
    rows = torch.full((blocks,), -7, dtype=torch.int32)
    mask = sum(1 << expert for expert in experts)
    mask -= mask >> 63 << 64
    expert_route[(len(experts),)](ids.int(), order, rows, mask, ids.numel(), blocks, BLOCK_M=BLOCK, CHUNK=64)
    return order.view(-1, BLOCK), rows


@pytest.mark.parametrize(
    ("experts", "highest"),
    [((0, 1, 2, 3), 4), ((3, 17, 62, 63), 64), ((2,), 3)],
    ids=["all", "sparse", "one-of-three"],
)
def test_each_route_of_the_bank_has_one_row_in_a_block_of_its_expert(experts: tuple[int, ...], highest: int) -> None:
    ids = torch.randint(-1, highest, (300,), generator=torch.Generator().manual_seed(highest))
    order, rows = routed(ids, experts)
    for index, expert in enumerate(experts):
        held = order[rows == index].flatten()
        wanted = torch.where(ids == expert)[0]
        assert torch.equal(held[: len(wanted)].long(), wanted), "ascending, without gaps"
        assert (held[len(wanted) :] == -1).all()
        assert len(held) - len(wanted) < BLOCK, "no block more than needed"
    assert (rows >= -1).all()
    assert torch.equal(rows, torch.cat([rows[rows >= 0], rows[rows < 0]])), "blocks that are not needed come last"


def test_all_on_one_expert_and_none_on_the_others() -> None:
    order, rows = routed(torch.full((200,), 1), (0, 1, 2))
    assert rows.tolist() == [1, 1] + [-1] * (len(rows) - 2)
    assert order[:2].flatten().tolist() == [*range(200)] + [-1] * 56
