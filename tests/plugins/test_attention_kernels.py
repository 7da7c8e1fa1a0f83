"""The kernels of the static key-value cache against the reference of CachedAttention."""

from __future__ import annotations

import pytest
import torch

from moiie_export.ops.cached_attention import cached_attention
from tests.plugins.experts import relative_error
from tests.plugins.interpreter import needs_triton

pytestmark = needs_triton


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).half()


def new_tokens(past: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor(past).unsqueeze(1) + torch.arange(tokens)


@pytest.mark.parametrize(
    ("heads", "key_heads", "tokens", "size", "past", "window"),
    [
        pytest.param(4, 2, 1, 24, [5], 0, id="grouped"),
        pytest.param(3, 3, 1, 96, [300], 0, id="several-splits-head-of-96"),
        pytest.param(2, 1, 3, 16, [0, 70], 0, id="three-tokens-ragged-rows"),
        pytest.param(2, 1, 1, 128, [20], 21, id="window-of-all"),
        pytest.param(2, 1, 2, 16, [290, 3], 8, id="window-skips-a-split"),
        pytest.param(20, 1, 1, 8, [9], 4, id="more-rows-than-a-tile"),
    ],
)
def test_update_and_attention(heads: int, key_heads: int, tokens: int, size: int, past: list[int], window: int) -> None:
    from moiie_plugins.run import run

    batch, capacity = len(past), 310
    query = random(batch, heads, tokens, size)
    key, value = random(2, batch, key_heads, tokens, size)
    caches = random(2, batch, key_heads, capacity, size)
    positions = new_tokens(past, tokens)
    arguments = (query, key, value, *caches, positions)
    expected, *presents = cached_attention(
        *(a.double() if a.is_floating_point() else a for a in arguments), key_heads, window
    )

    lengths = torch.tensor(past, dtype=torch.int32)
    for cache, update, present in zip(caches, (key, value), presents, strict=True):
        run("KVCacheUpdate", {"cache": cache, "update": update, "past_lengths": lengths}, None, {})
        assert torch.equal(cache.double(), present)
        for row, length in enumerate(past):
            cache[row, :, length + tokens :] = float("nan")  # never written: may be anything
            if window:
                cache[row, :, : max(0, length - window + 1)] = float("nan")  # behind the window: no longer seen
    out = torch.full_like(query, float("nan"))
    tensors = {"query": query, "key": caches[0], "value": caches[1], "past_lengths": lengths}
    run("DecodeAttention", tensors, out, {"window": window})
    assert relative_error(out, expected) <= 2e-3


def test_scale_of_scores() -> None:
    from moiie_plugins.run import run

    query, key, value = random(3, 1, 2, 1, 16)
    cache = random(2, 1, 2, 4, 16)
    cache[0, :, :, 0:1], cache[1, :, :, 0:1] = key, value
    tensors = {
        "query": query * 3,
        "key": cache[0],
        "value": cache[1],
        "past_lengths": torch.tensor([3], dtype=torch.int32),
    }
    out = torch.empty_like(query)
    run("DecodeAttention", tensors, out, {"scale": 0.7})
    scores = (query.double() * 3 @ cache[0].double().transpose(2, 3)) * 0.7
    assert relative_error(out, scores.softmax(dim=-1) @ cache[1].double()) <= 2e-3


def test_tokens_beyond_the_buffer_are_written_nowhere() -> None:
    from moiie_plugins.run import run

    cache = torch.zeros(2, 2, 4, 130, dtype=torch.float16)
    update = torch.ones(2, 2, 3, 130, dtype=torch.float16)
    lengths = torch.tensor([3, -1], dtype=torch.int32)
    run("KVCacheUpdate", {"cache": cache, "update": update, "past_lengths": lengths}, None, {})
    expected = torch.zeros_like(cache)
    expected[0, :, 3:] = 1
    expected[1, :, 0:2] = 1
    assert torch.equal(cache, expected)
