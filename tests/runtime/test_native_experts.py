from __future__ import annotations

import numpy as np
import pytest

from tests.runtime.native_ops import ISAS, REFUSALS, error, need_isa, product, random_weight, run, session, swiglu

ROUNDED = 3e-3
"""Between the two products, values that differ in the last bit may round to neighbouring steps of 8 bits."""
FREE = 0.05


class Layer:
    """Random experts of one layer and the op's attributes."""

    def __init__(self, hidden, inner, experts, bits=(4, 4), groups=(32, 32), seed=0):
        rng = np.random.default_rng(seed)
        self.experts = list(experts)
        self.gate_up = [random_weight(rng, 2 * inner, hidden, bits[0], groups[0]) for _ in experts]
        self.down = [random_weight(rng, hidden, inner, bits[1], groups[1]) for _ in experts]
        self.sizes = {"H": hidden, "I": inner, "bits_gate_up": bits[0], "bits_down": bits[1]}
        self.sizes |= {"group_gate_up": groups[0], "group_down": groups[1], "experts": self.experts}

    def feeds(self, x, ids, weights):
        packed = {f"gate_up{i}": w.packed(swiglu=True) for i, w in enumerate(self.gate_up)}
        packed |= {f"down{i}": w.packed() for i, w in enumerate(self.down)}
        return {"x": x, "ids": ids, "weights": weights, **packed}

    def run(self, x, ids, weights, threads=2):
        return run("QExperts", self.feeds(x, ids, weights), threads, **self.sizes)

    def expected(self, x, ids, weights, multiply):
        out = np.zeros(x.shape)
        for expert, gate_up, down in zip(self.experts, self.gate_up, self.down, strict=True):
            rows, slots = np.nonzero(ids == expert)
            if rows.size:
                inner = swiglu(multiply(x[rows], gate_up)).astype(np.float32)
                np.add.at(out, rows, multiply(inner, down) * weights[rows, slots, None])
        return out

    def routes(self, tokens, k, seed=1, ids=None):
        rng = np.random.default_rng(seed)
        pool = np.array(self.experts if ids is None else ids, np.int32)
        chosen = np.stack([rng.permutation(pool)[:k] for _ in range(tokens)]) if tokens else np.zeros((0, k), np.int32)
        return rng.standard_normal((tokens, self.sizes["H"]), np.float32), chosen, rng.random((tokens, k), np.float32)


LAYERS = {
    "int4": Layer(64, 96, range(4)),
    "int8 of large groups": Layer(128, 128, [1, 2, 5], bits=(8, 8), groups=(128, 64)),
    "mixed": Layer(96, 160, [0, 3], bits=(4, 8), groups=(32, 32)),
    "one expert": Layer(32, 32, [7]),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("tokens", "k"), [(1, 2), (3, 1), (70, 2), (150, 3)])
def test_experts(name, tokens, k, isa, monkeypatch):
    need_isa(monkeypatch, isa)
    layer = LAYERS[name]
    given = layer.routes(tokens, min(k, len(layer.experts)), seed=tokens)
    out = layer.run(*given)
    assert error(out, layer.expected(*given, lambda x, w: product(x, w, isa))) < ROUNDED
    assert error(out, layer.expected(*given, lambda x, w: x @ w.dense.T)) < FREE


@pytest.mark.parametrize("tokens", [1, 40])
def test_routes_to_other_experts_add_nothing(tokens):
    layer = LAYERS["mixed"]
    x, ids, weights = layer.routes(tokens, 4, ids=[-1, 0, 1, 3, 1 << 30])
    out = layer.run(x, ids, weights)
    assert error(out, layer.expected(x, ids, weights, lambda a, w: product(a, w, "avx512"))) < FREE
    np.testing.assert_array_equal(layer.run(x, np.full_like(ids, 2), weights), np.zeros_like(x))
    np.testing.assert_array_equal(layer.run(x, ids[:, :0], weights[:, :0]), np.zeros_like(x))
    assert layer.run(x[:0], ids[:0], weights[:0]).shape == (0, 96)


def test_one_expert_may_be_chosen_twice():
    layer = LAYERS["int4"]
    x, _, weights = layer.routes(5, 2)
    twice = layer.run(x, np.full((5, 2), 3, np.int32), weights)
    once = layer.run(x, np.full((5, 1), 3, np.int32), weights.sum(1, keepdims=True))
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-5)


def test_all_tokens_to_one_expert_and_none_to_another():
    layer = LAYERS["int8 of large groups"]
    x, ids, weights = layer.routes(90, 1)
    ids[:80], ids[80:] = 2, 5
    out = layer.run(x, ids, weights)
    assert error(out, layer.expected(x, ids, weights, lambda a, w: a @ w.dense.T)) < FREE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_threads_change_no_bit(tokens, isa, monkeypatch):
    need_isa(monkeypatch, isa)
    layer = Layer(256, 320, range(4))
    given = layer.routes(tokens, 2)
    first, *others = (layer.run(*given, threads) for threads in (1, 2, 2, 3))
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_what_is_not_finite_stays_with_its_token():
    layer = LAYERS["int4"]
    x, ids, weights = layer.routes(6, 2)
    x[2, 5] = np.nan
    out = layer.run(x, ids, weights)
    assert np.isnan(out[2]).all()
    assert np.isfinite(np.delete(out, 2, 0)).all()


def test_a_long_prompt_between_short_ones_leaves_no_trace():
    layer = Layer(128, 256, range(4))
    short, long = layer.routes(1, 2), layer.routes(2000, 2)
    feeds = layer.feeds(*short)
    opened = session("QExperts", feeds, **layer.sizes)
    first = opened.run(None, feeds)[0]
    opened.run(None, layer.feeds(*long))
    np.testing.assert_array_equal(opened.run(None, feeds)[0], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": [1, 0]}, "must be ascending"),
        ({"experts": [1, 1]}, "must be ascending"),
        ({"experts": [-1, 1]}, "not negative"),
        ({"bits_down": 3}, "bits must be 4 or 8, not 3"),
        ({"group_gate_up": 64}, "96 columns cannot be cut into groups of 64"),
    ],
)
def test_attributes_are_checked(change, message):
    layer = LAYERS["mixed"]
    with pytest.raises(REFUSALS, match=message):
        session("QExperts", layer.feeds(*layer.routes(2, 1)), **{**layer.sizes, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 64), np.float32)}, r"x must be \[T, 96\], not \[2, 64\]"),
        ({"x": np.zeros(96, np.float32)}, r"x must be \[T, 96\], not \[96\]"),
        ({"ids": np.zeros((3, 1), np.int32)}, r"must both be \[2, k\], not \[3, 1\] and \[2, 1\]"),
        ({"weights": np.zeros((2, 2), np.float32)}, r"must both be \[2, k\], not \[2, 1\] and \[2, 2\]"),
        ({"gate_up1": np.zeros(7, np.uint8)}, r"gate_up: packed weight must be \[\d+\], not \[7\]"),
        ({"down0": np.zeros(0, np.uint8)}, r"down: packed weight must be \[\d+\], not \[0\]"),
        ({"extra": np.zeros(7, np.uint8)}, "2 experts need 4 packed weights, not 5"),
    ],
)
def test_shapes_are_checked(change, message):
    layer = LAYERS["mixed"]
    with pytest.raises(REFUSALS, match=message):
        run("QExperts", {**layer.feeds(*layer.routes(2, 1)), **change}, **layer.sizes)


def test_any_wrong_shape_is_an_error_and_no_crash():
    layer = LAYERS["mixed"]
    feeds = layer.feeds(*layer.routes(2, 1))
    opened = session("QExperts", feeds, **layer.sizes)
    rng = np.random.default_rng(5)
    for _ in range(60):
        name = rng.choice(list(feeds))
        shape = tuple(rng.integers(0, 100, rng.integers(0, 4)))
        if shape == feeds[name].shape:
            continue
        with pytest.raises(REFUSALS, match="must"):
            opened.run(None, {**feeds, name: np.zeros(shape, feeds[name].dtype)})
    assert opened.run(None, feeds)[0].shape == (2, 96)
