from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiie_runtime.feature_cache import FeatureCache


def features(value: float, size: int = 4) -> np.ndarray:
    return np.full(size, value, np.float32)


def test_what_was_put_is_found_and_counted():
    cache = FeatureCache(64)
    assert cache.get(("a", "clip")) is None
    kept = features(1)
    cache.put(("a", "clip"), kept)
    assert cache.get(("a", "clip")) is kept
    assert cache.get(("a", "dino")) is None
    assert (cache.hits, cache.misses, cache.nbytes, len(cache)) == (1, 2, 16, 1)


def test_the_entry_used_longest_ago_goes_first():
    cache = FeatureCache(32)
    cache.put(("a", ""), features(1))
    cache.put(("b", ""), features(2))
    cache.get(("a", ""))
    cache.put(("c", ""), features(3))
    assert [("a", "") in cache, ("b", "") in cache, ("c", "") in cache] == [True, False, True]
    assert (cache.hits, cache.misses) == (1, 0)  # asking whether something is there is no lookup


def test_what_exceeds_the_budget_alone_is_not_kept_and_displaces_nothing():
    cache = FeatureCache(20)
    cache.put(("a", ""), features(1))
    cache.put(("b", ""), features(2, size=6))
    assert ("a", "") in cache
    assert ("b", "") not in cache


def test_a_budget_of_zero_keeps_nothing():
    cache = FeatureCache(0)
    cache.put(("a", ""), features(1))
    assert not len(cache)


def test_kept_features_cannot_be_changed_and_hold_no_more_than_themselves():
    cache = FeatureCache(64)
    whole = np.ones((100, 4), np.float32)
    cache.put(("a", ""), whole[0])
    kept = cache.get(("a", ""))
    whole[:] = 0
    assert (kept == 1).all()
    assert kept.base is None
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 5


def test_putting_again_replaces_and_clearing_forgets():
    cache = FeatureCache(64)
    cache.put(("a", ""), features(1))
    cache.put(("a", ""), features(2, size=8))
    assert (cache.nbytes, cache.get(("a", ""))[0]) == (32, 2)
    cache.clear()
    assert (cache.nbytes, len(cache), cache.hits) == (0, 0, 1)


@given(
    budget=st.integers(0, 40),
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 12), st.booleans()), max_size=30),
)
def test_bytes_are_counted_and_never_exceed_the_budget(budget, steps):
    cache = FeatureCache(budget)
    for name, size, reading in steps:
        if reading:
            cache.get((name, ""))
        else:
            cache.put((name, ""), features(0, size))
        held = [cache._entries[key].nbytes for key in cache._entries]
        assert cache.nbytes == sum(held) <= budget


def test_several_threads_may_use_it():
    cache = FeatureCache(16 * 5)

    def work(seed: int) -> None:
        for value in np.random.default_rng(seed).integers(0, 12, 400):
            found = cache.get((str(value), ""))
            assert found is None or (found == value).all()
            cache.put((str(value), ""), features(value))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.hits + cache.misses == 1600
    assert cache.nbytes <= cache.budget
    assert cache.nbytes == 16 * len(cache)
