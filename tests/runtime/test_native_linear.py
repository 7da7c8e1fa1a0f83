from __future__ import annotations

import numpy as np
import pytest

from tests.runtime.native_ops import ISAS, REFUSALS, error, need_isa, product, random_weight, run, session, swiglu

ROUNDED = 2e-6
"""Same roundings, another order of sums."""
FREE = 0.03
"""Against the product of activations that are not rounded."""

# N, K, bits, group, rows: tails of blocks, one strip, several a group, one row, some, more than a panel
SHAPES = [
    (64, 64, 4, 32, 1),
    (37, 96, 4, 32, 5),
    (64, 256, 8, 64, 3),
    (70, 128, 8, 128, 70),
    (1, 32, 4, 32, 33),
    (54, 192, 4, 64, 50),
    (34, 32, 8, 32, 2),
    (96, 1024, 4, 128, 130),
]


def made(n, k, bits, group, rows, seed=0):
    rng = np.random.default_rng(seed)
    return random_weight(rng, n, k, bits, group), rng.standard_normal((rows, k), np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "k", "bits", "group", "rows"), SHAPES)
def test_product(n, k, bits, group, rows, isa, monkeypatch):
    need_isa(monkeypatch, isa)
    weight, x = made(n, k, bits, group, rows)
    y = run("QLinear", {"x": x, "w": weight.packed()}, N=n, K=k, bits=bits, group=group)
    assert error(y, product(x, weight, isa)) < ROUNDED
    assert error(y, x @ weight.dense.T) < FREE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("inner", "rows"), [(16, 1), (27, 3), (40, 70)])
def test_gate_bias_and_residual(inner, rows, isa, monkeypatch):
    need_isa(monkeypatch, isa)
    weight, x = made(2 * inner, 96, 4, 32, rows)
    rng = np.random.default_rng(1)
    bias, residual = rng.standard_normal(2 * inner, np.float32), rng.standard_normal((rows, inner), np.float32)
    feeds = {"x": x, "w": weight.packed(swiglu=True), "bias": bias, "residual": residual}
    sizes = {"N": 2 * inner, "K": 96, "bits": 4, "group": 32, "swiglu": 1}
    both = product(x, weight, isa)
    assert error(run("QLinear", feeds, **sizes), swiglu(both + bias) + residual) < ROUNDED
    assert error(run("QLinear", {**feeds, "bias": None}, **sizes), swiglu(both) + residual) < ROUNDED
    assert error(run("QLinear", {"x": x, "w": feeds["w"], "bias": bias}, **sizes), swiglu(both + bias)) < ROUNDED


def test_leading_dimensions_are_kept():
    weight, x = made(40, 64, 4, 32, 6)
    sizes = {"N": 40, "K": 64, "bits": 4, "group": 32}
    packed = weight.packed()
    flat = run("QLinear", {"x": x, "w": packed}, **sizes)
    np.testing.assert_array_equal(
        run("QLinear", {"x": x.reshape(1, 2, 3, 64), "w": packed}, **sizes).reshape(6, 40), flat
    )
    assert run("QLinear", {"x": x[:0], "w": packed}, **sizes).shape == (0, 40)
    np.testing.assert_array_equal(run("QLinear", {"x": x[0], "w": packed}, **sizes), flat[0])


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa, monkeypatch):
    need_isa(monkeypatch, isa)
    for rows in (1, 3, 70):
        weight, x = made(2000, 256, 4, 32, rows)
        sizes = {"N": 2000, "K": 256, "bits": 4, "group": 32}
        first, *others = (run("QLinear", {"x": x, "w": weight.packed()}, threads, **sizes) for threads in (1, 2, 2, 3))
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_a_row_is_the_same_alone_and_among_others(isa, monkeypatch):
    need_isa(monkeypatch, isa)
    weight, x = made(64, 128, 4, 32, 70)
    sizes = {"N": 64, "K": 128, "bits": 4, "group": 32}
    together = run("QLinear", {"x": x, "w": weight.packed()}, **sizes)
    for row in (0, 63, 69):
        np.testing.assert_array_equal(
            run("QLinear", {"x": x[row : row + 1], "w": weight.packed()}, **sizes)[0], together[row]
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 60])
def test_zeros_and_what_is_not_finite(rows, isa, monkeypatch):
    need_isa(monkeypatch, isa)
    weight, x = made(40, 96, 8, 32, rows)
    sizes = {"N": 40, "K": 96, "bits": 8, "group": 32}
    assert not run("QLinear", {"x": np.zeros_like(x), "w": weight.packed()}, **sizes).any()
    tiny = run("QLinear", {"x": np.full_like(x, 1e-39), "w": weight.packed()}, **sizes)
    assert np.isfinite(tiny).all()
    assert np.abs(tiny).max() < 1e-36
    for bad in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[0, 40] = bad
        out = run("QLinear", {"x": y, "w": weight.packed()}, **sizes)
        assert not np.isfinite(out[0]).any()
        assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_weights_do_not_saturate(isa, monkeypatch):
    need_isa(monkeypatch, isa)
    for bits, value in ((4, -8), (4, 7), (8, -128), (8, 127)):
        weight, _ = made(32, 64, bits, 32, 1)
        weight.values[:] = value
        for sign in (1, -1):
            x = np.full((2, 64), sign, np.float32)
            y = run("QLinear", {"x": x, "w": weight.packed()}, N=32, K=64, bits=bits, group=32)
            assert error(y, x @ weight.dense.T) < ROUNDED


SIZES = {"N": 40, "K": 64, "bits": 4, "group": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be 4 or 8, not 5"),
        ({"group": 48}, "group must be 32, 64 or 128, not 48"),
        ({"K": 80}, "80 columns cannot be cut into groups of 32"),
        ({"N": 0}, "0 x 64 cannot be"),
        ({"K": -64}, "cannot be"),
        ({"N": 1 << 40}, "cannot be"),
        ({"N": 41, "swiglu": 1}, "even number of rows"),
    ],
)
def test_attributes_are_checked(change, message):
    weight, x = made(40, 64, 4, 32, 2)
    with pytest.raises(REFUSALS, match=message):
        session("QLinear", {"x": x, "w": weight.packed()}, **{**SIZES, **change})


def test_a_missing_attribute_is_named():
    weight, x = made(40, 64, 4, 32, 2)
    with pytest.raises(REFUSALS, match="group"):
        session("QLinear", {"x": x, "w": weight.packed()}, N=40, K=64, bits=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 32), np.float32)}, r"x must be \[.., 64\], not \[2, 32\]"),
        ({"x": np.array(1, np.float32)}, r"x must be \[.., 64\], not \[\]"),
        ({"w": np.zeros(10, np.uint8)}, r"packed weight must be \[2304\], not \[10\]"),
        ({"w": np.zeros((2, 1152), np.uint8)}, r"packed weight must be \[2304\], not \[2, 1152\]"),
        ({"bias": np.zeros(41, np.float32)}, r"bias must be \[40\], not \[41\]"),
        ({"residual": np.zeros((3, 40), np.float32)}, "the residual does not have the shape of the result"),
    ],
)
def test_shapes_are_checked(change, message):
    weight, x = made(40, 64, 4, 32, 2)
    feeds = {"x": x, "w": weight.packed(), "bias": None, "residual": None, **change}
    with pytest.raises(REFUSALS, match=message):
        run("QLinear", feeds, **SIZES)


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("MOIIE_CPU_ISA", "sse9")
    weight, x = made(40, 64, 4, 32, 2)
    with pytest.raises(REFUSALS, match='unknown instruction set "sse9"'):
        session("QLinear", {"x": x, "w": weight.packed()}, **SIZES)
