"""Unpacking without conversions, for every number at every place of a word."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("CI") != "true":
    pytest.importorskip("triton")

import triton
import triton.language as tl

from moiie_plugins.kernels.packed import integers


@triton.jit  # type: ignore[untyped-decorator]
def unpack(words, out, BITS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.arange(0, ROWS)[:, None]
    numbers = integers(tl.load(words + row * 2 + tl.arange(0, 2)[None, :]), BITS)
    tl.store(out + row * (64 // BITS) + tl.arange(0, 64 // BITS)[None, :], numbers)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_at_every_place(bits: int) -> None:
    half, fields = 1 << (bits - 1), 64 // bits
    # Every number passes through every place, with others beside it.
    places = torch.arange(2 * half)[:, None] + torch.arange(fields)[None, :] * 3
    meant = places % (2 * half) - half
    stored = meant.to(torch.int8)
    if bits == 4:
        stored = (stored[:, 0::2] & 15) | (stored[:, 1::2] << 4)
    out = torch.full(meant.shape, float("nan"), dtype=torch.float16)
    unpack[(1,)](stored.contiguous().view(torch.int32), out, BITS=bits, ROWS=2 * half)
    assert torch.equal(out, meant.half())
