from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_runtime import native_packing
from moiie_runtime.errors import MoiieError
from moiie_runtime.native_packing import pack, pack_chunks, pack_stored, packed_bytes
from tests.runtime.native_ops import random_weight


def unpack(packed: np.ndarray, rows: int, columns: int, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of all rows of all blocks, read byte by byte as layout.h describes it."""
    blocks, groups = -(-rows // 32), columns // group
    values, scales = np.empty((blocks * 32, columns), np.int16), np.empty((blocks * 32, groups), np.float16)
    position = 0
    for block in range(blocks):
        for g in range(groups):
            scales[block * 32 : block * 32 + 32, g] = packed[position : position + 64].view(np.float16)
            position += 64
            for first in range(g * group, (g + 1) * group, 8 if bits == 4 else 4):
                quads = packed[position : position + 128].reshape(32, 4).astype(np.int16)
                position += 128
                into = values[block * 32 : block * 32 + 32]
                into[:, first : first + 4] = (quads & 15) - 8 if bits == 4 else quads - 128
                if bits == 4:
                    into[:, first + 4 : first + 8] = (quads >> 4) - 8
    assert position == packed.size
    return values, scales


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 4), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(0, 99)
)
def test_what_was_packed_is_there(rows, groups, bits, group, seed):
    weight = random_weight(np.random.default_rng(seed), rows, groups * group, bits, group)
    packed = pack(weight.values, weight.scales, bits)
    assert packed.size == packed_bytes(rows, groups * group, bits, group)
    values, scales = unpack(packed, rows, groups * group, bits, group)
    np.testing.assert_array_equal(values[:rows], weight.values)
    np.testing.assert_array_equal(scales[:rows], weight.scales)
    assert not values[rows:].any()
    assert not scales[rows:].any()


@pytest.mark.parametrize("inner", [1, 16, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_gate_and_up_lie_side_by_side(inner, bits):
    weight = random_weight(np.random.default_rng(inner), 2 * inner, 64, bits, 32)
    packed = pack(weight.values, weight.scales, bits, swiglu=True)
    blocks = -(-inner // 16)
    assert packed.size == packed_bytes(2 * inner, 64, bits, 32, swiglu=True)
    values, scales = unpack(packed, blocks * 32, 64, bits, 32)
    for found, expected in ((values, weight.values), (scales, weight.scales)):
        halves = found.reshape(blocks, 2, 16, -1)
        np.testing.assert_array_equal(halves[:, 0].reshape(blocks * 16, -1)[:inner], expected[:inner])
        np.testing.assert_array_equal(halves[:, 1].reshape(blocks * 16, -1)[:inner], expected[inner:])


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_bundles_form_and_pieces_give_the_same_bytes(swiglu, monkeypatch):
    weight = random_weight(np.random.default_rng(3), 150, 128, 4, 64)
    nibbles = weight.values.astype(np.uint8) & 15
    stored = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int8)
    expected = pack(weight.values, weight.scales, 4, swiglu)
    np.testing.assert_array_equal(pack_stored(stored, weight.scales, 4, swiglu), expected)
    monkeypatch.setattr(native_packing, "_CHUNK_BYTES", 1)
    pieces = list(pack_chunks(stored, weight.scales, 4, swiglu))
    assert len(pieces) == 5
    np.testing.assert_array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group", "swiglu"),
    [(8, 64, 5, 32, False), (8, 64, 4, 16, False), (8, 80, 4, 32, False), (7, 64, 4, 32, True), (0, 64, 4, 32, False)],
)
def test_what_has_no_layout_is_refused(rows, columns, bits, group, swiglu):
    with pytest.raises(MoiieError):
        packed_bytes(rows, columns, bits, group, swiglu)


def test_values_that_do_not_fit_are_refused():
    scales = np.ones((2, 2), np.float16)
    with pytest.raises(MoiieError, match="outside -8..7"):
        pack(np.full((2, 64), 8, np.int8), scales, 4)
    with pytest.raises(MoiieError, match=r"scales \[2, 2\] do not fit a weight \[3, 64\]"):
        pack(np.zeros((3, 64), np.int8), scales, 8)
    with pytest.raises(MoiieError, match="groups of 48"):
        pack(np.zeros((2, 96), np.int8), scales, 8)
