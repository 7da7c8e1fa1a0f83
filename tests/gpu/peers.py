"""The same layer by other means: PyTorch's loop over experts, its grouped product, torch.compile, and bare cuBLAS."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

Banks = tuple[torch.Tensor, torch.Tensor]
Peer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Banks], torch.Tensor]

WAITS = ("loop",)
"""Peers that wait for the device within a layer: no CUDA graph can hold them."""


def loop(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, banks: Banks) -> torch.Tensor:
    """As Transformers and the authors do: expert by expert."""
    out = torch.zeros_like(hidden)
    for expert, (gate_up, down) in enumerate(zip(*banks, strict=True)):
        rows, slots = torch.where(ids == expert)
        gate, up = F.linear(hidden[rows], gate_up).chunk(2, dim=-1)
        out.index_add_(0, rows, F.linear(F.silu(gate) * up, down) * shares[rows, slots, None].to(hidden.dtype))
    return out


def gathered(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, banks: Banks) -> torch.Tensor:
    """For few rows: the chosen experts' weights as a batch of matrices, without a wait for the host."""
    chosen = [bank[ids.flatten().long()] for bank in banks]
    rows = hidden.repeat_interleave(ids.shape[1], dim=0).unsqueeze(-1)
    gate, up = torch.bmm(chosen[0], rows).chunk(2, dim=1)
    routed = torch.bmm(chosen[1], F.silu(gate) * up).view(*ids.shape, -1)
    return (routed * shares.unsqueeze(-1).to(routed.dtype)).sum(dim=1)


def grouped(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, banks: Banks) -> torch.Tensor:
    """torch._grouped_mm over rows that are sorted by expert."""
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    # bincount would wait for the device to learn how long its result is.
    counts = (flat.unsqueeze(1) == torch.arange(banks[0].shape[0], device=flat.device)).sum(dim=0)
    ends = counts.cumsum(0).to(torch.int32)
    rows = order // ids.shape[1]
    grouped_mm = torch._grouped_mm
    gate, up = grouped_mm(hidden[rows], banks[0].transpose(1, 2), offs=ends).chunk(2, dim=-1)
    routed = grouped_mm(F.silu(gate) * up, banks[1].transpose(1, 2), offs=ends)
    out = torch.zeros_like(hidden)
    return out.index_add_(0, rows, routed * shares.flatten()[order, None].to(routed.dtype))


def products(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, banks: Banks) -> torch.Tensor:
    """The same number of operations as two plain matrix products, with nothing around them."""
    rows = hidden.repeat(ids.shape[1], 1)
    wide = rows @ banks[0][0].T
    return wide[:, : banks[1].shape[2]] @ banks[1][0].T
