"""CachedAttention: new keys and values into the buffers, attention over what they hold, in torch and in the body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_export.ops.cached_attention import cached_attention

Run = Callable[..., list[np.ndarray]]
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """`past`: keys each row has already."""

    past: tuple[int, ...] = (0,)
    tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    capacity: int = 24
    head_dim: int = 8
    window: int = 0

    @property
    def attributes(self) -> dict[str, int]:
        return {"num_key_value_heads": self.kv_heads, "local_window_size": self.window}


def make(sizes: Sizes, seed: int = 0) -> Inputs:
    """Random tensors; slots that no row has filled yet hold large garbage, which nothing may see."""
    rng = np.random.default_rng(seed)
    batch = len(sizes.past)

    def normal(heads: int, length: int) -> np.ndarray:
        return rng.standard_normal((batch, heads, length, sizes.head_dim)).astype(np.float32)

    inputs = {
        "query": normal(sizes.heads, sizes.tokens),
        "key": normal(sizes.kv_heads, sizes.tokens),
        "value": normal(sizes.kv_heads, sizes.tokens),
        "past_key": normal(sizes.kv_heads, sizes.capacity),
        "past_value": normal(sizes.kv_heads, sizes.capacity),
        "positions": np.array(sizes.past, np.int64)[:, None] + np.arange(sizes.tokens),
    }
    for row, length in enumerate(sizes.past):
        inputs["past_key"][row, :, length:] = 1e4
        inputs["past_value"][row, :, length:] = -1e4
    return inputs


def in_torch(inputs: Inputs, sizes: Sizes) -> list[np.ndarray]:
    tensors = [torch.from_numpy(value) for value in inputs.values()]
    return [output.numpy() for output in cached_attention(*tensors, sizes.kv_heads, sizes.window)]


def by_hand(inputs: Inputs, sizes: Sizes) -> list[np.ndarray]:
    """Query by query in float64, over a list of the keys it may see (spec 4.5)."""
    out = np.zeros_like(inputs["query"])
    keys, values = inputs["past_key"].copy(), inputs["past_value"].copy()
    for row, length in enumerate(sizes.past):
        keys[row, :, length : length + sizes.tokens] = inputs["key"][row]
        values[row, :, length : length + sizes.tokens] = inputs["value"][row]
        for head in range(sizes.heads):
            shared = head // (sizes.heads // sizes.kv_heads)
            for t in range(sizes.tokens):
                last = length + t
                first = max(0, last - sizes.window + 1) if sizes.window else 0
                seen = keys[row, shared, first : last + 1].astype(np.float64)
                scores = seen @ inputs["query"][row, head, t] / np.sqrt(sizes.head_dim)
                weights = np.exp(scores - scores.max())
                out[row, head, t] = weights / weights.sum() @ values[row, shared, first : last + 1]
    return [out, keys, values]


def check(run_body: Run, sizes: Sizes, seed: int = 0) -> None:
    inputs = make(sizes, seed)
    before = {name: value.copy() for name, value in inputs.items()}
    expected = by_hand(inputs, sizes)
    for found in (in_torch(inputs, sizes), run_body("CachedAttention", sizes.attributes, inputs)):
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=1e-5, strict=True)
        np.testing.assert_array_equal(found[1], expected[1], strict=True)
        np.testing.assert_array_equal(found[2], expected[2], strict=True)
    for name, value in inputs.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize("window", [0, 1, 6, 1000])
def test_body_equals_torch_equals_attention_by_hand(run_body: Run, tokens: int, window: int) -> None:
    check(run_body, Sizes(past=(3,), tokens=tokens, capacity=320, head_dim=4, window=window))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2), (8, 4)])
def test_query_heads_share_key_heads_in_groups(run_body: Run, heads: int, kv_heads: int) -> None:
    check(run_body, Sizes(past=(0, 2), heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("past", [(0, 0), (0, 7), (7, 0), (5, 19), (2, 9, 4)])
@pytest.mark.parametrize("window", [0, 4])
def test_rows_of_different_lengths(run_body: Run, past: tuple[int, ...], window: int) -> None:
    check(run_body, Sizes(past=past, window=window))


@pytest.mark.parametrize("past", [(23,), (0,), (11, 23)])
def test_one_token_up_to_the_last_slot(run_body: Run, past: tuple[int, ...]) -> None:
    check(run_body, Sizes(past=past, tokens=1, window=3))
    check(run_body, Sizes(past=past, tokens=1))


def test_a_whole_buffer_at_once(run_body: Run) -> None:
    check(run_body, Sizes(tokens=24))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    past=st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
    tokens=st.integers(1, 7),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    window=st.integers(0, 9),
    half=st.integers(1, 4),
)
def test_any_sizes(
    run_body: Run, past: tuple[int, ...], tokens: int, groups: int, kv_heads: int, window: int, half: int
) -> None:
    sizes = Sizes(past, tokens, groups * kv_heads, kv_heads, 20, 2 * half, window)
    check(run_body, sizes, seed=tokens)


def test_right_padding_is_never_seen_and_the_next_step_overwrites_it(run_body: Run) -> None:
    """Row 1 has two tokens of five; its padding is written behind them, then two real tokens take the first slots of it."""
    sizes = Sizes(past=(0, 0))
    inputs, real = make(sizes), 2
    alone = Sizes(tokens=real)
    cut = {name: value[1:, :, :real] for name, value in inputs.items() if name in ("query", "key", "value")}
    rest = {
        "past_key": inputs["past_key"][1:],
        "past_value": inputs["past_value"][1:],
        "positions": np.arange(real)[None],
    }
    expected = in_torch({**cut, **rest}, alone)
    first = run_body("CachedAttention", sizes.attributes, inputs)
    np.testing.assert_allclose(first[0][1:, :, :real], expected[0], atol=1e-5)

    step = make(Sizes(past=(5, real), tokens=2), seed=9)
    step |= {"past_key": first[1], "past_value": first[2]}
    batch = run_body("CachedAttention", sizes.attributes, step)
    single = {name: value[1:] for name, value in step.items()} | {"past_key": expected[1], "past_value": expected[2]}
    np.testing.assert_allclose(batch[0][1:], in_torch(single, Sizes(past=(real,), tokens=2))[0], atol=1e-5)
    np.testing.assert_array_equal(batch[1][1, :, :4], np.concatenate([inputs["key"][1, :, :2], step["key"][1]], axis=1))


def test_token_by_token_equals_all_at_once(run_body: Run) -> None:
    sizes = Sizes(past=(3, 8), window=4)
    inputs = make(sizes)
    whole = in_torch(inputs, sizes)
    keys, values = inputs["past_key"], inputs["past_value"]
    for t in range(sizes.tokens):
        step = {name: inputs[name][:, :, t : t + 1] for name in ("query", "key", "value")}
        step |= {"past_key": keys, "past_value": values, "positions": inputs["positions"][:, t : t + 1]}
        out, keys, values = run_body("CachedAttention", sizes.attributes, step)
        np.testing.assert_allclose(out, whole[0][:, :, t : t + 1], atol=1e-5)
    np.testing.assert_array_equal(keys, whole[1])
    np.testing.assert_array_equal(values, whole[2])


def test_the_buffers_are_updated_in_place_when_past_and_present_are_bound_together(
    body_session: Callable[..., onnxruntime.InferenceSession],
) -> None:
    sizes = Sizes(past=(3, 8))
    inputs = make(sizes)
    expected = by_hand(inputs, sizes)
    session = body_session("CachedAttention", sizes.attributes, inputs)
    binding = session.io_binding()

    def bind(method: Any, name: str, array: np.ndarray) -> None:
        method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    for name, array in inputs.items():
        bind(binding.bind_input, name, array)
    out = np.empty_like(inputs["query"])
    bind(binding.bind_output, "out", out)
    for kind in ("key", "value"):
        bind(binding.bind_output, f"present_{kind}", inputs[f"past_{kind}"])
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_array_equal(inputs["past_key"], expected[1])
    np.testing.assert_array_equal(inputs["past_value"], expected[2])


@pytest.mark.parametrize("past", [(22,), (24,), (0, 20)])
def test_more_tokens_than_slots_are_refused_not_cut(run_body: Run, past: tuple[int, ...]) -> None:
    sizes = Sizes(past=past)
    with pytest.raises(RuntimeError):
        in_torch(make(sizes), sizes)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run_body("CachedAttention", sizes.attributes, make(sizes))


def test_scores_of_any_size_stay_finite(run_body: Run) -> None:
    sizes = Sizes(past=(2,))
    inputs = make(sizes)
    inputs["query"] *= 1e4
    for found in (in_torch(inputs, sizes), run_body("CachedAttention", sizes.attributes, inputs)):
        assert np.isfinite(found[0]).all()


def test_the_first_token_sees_itself_alone() -> None:
    sizes = Sizes(tokens=1, heads=2)
    inputs = make(sizes)
    np.testing.assert_allclose(in_torch(inputs, sizes)[0], inputs["value"], rtol=1e-6)
    windowed = replace(sizes, tokens=5, window=1, heads=2)
    inputs = make(windowed)
    np.testing.assert_allclose(in_torch(inputs, windowed)[0], inputs["value"], rtol=1e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_the_fake_agrees_with_the_op(window: int) -> None:
    sizes = Sizes(past=(3, 8))
    tensors = [torch.from_numpy(value) for value in make(sizes).values()]
    torch.library.opcheck(cached_attention, (*tensors, sizes.kv_heads, window))
