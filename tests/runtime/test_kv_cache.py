from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency
from moiie_runtime.kv_cache import KVCache, _moves, static_rows


@pytest.fixture
def bundle(manifest, write_bundle) -> Bundle:
    return Bundle.open(write_bundle(manifest))


class Bindings(dict):
    """Stands for a session and notes what is bound."""

    bind = dict.__setitem__


@pytest.mark.parametrize(("shape", "rows"), [((2, 2, 8, 4), 2), (("batch", 2, 8, 4), None), ((), None)])
def test_rows_are_fixed_where_the_graph_says_a_number(bundle, shape, rows):
    name, decode = "past_key_values.0.key", bundle.components["decoder_decode"]
    given = replace(decode, inputs={**decode.inputs, name: TensorSpec("float32", shape)})
    assert static_rows(replace(bundle, components={**bundle.components, "decoder_decode": given})) == rows


def test_past_and_present_are_the_same_buffers(bundle):
    cache, session = KVCache(bundle, 3), Bindings()
    cache.bind(session)
    assert len(session) == 4 * 2 * 2
    for name in cache:
        assert session[f"past_key_values.{name}"] is session[f"present.{name}"] is cache[name]
        assert cache.addresses()[name] == cache[name].ctypes.data
        assert cache[name].shape == (3, 2, 64, 8)
        assert cache[name].dtype == np.float32
        assert not cache[name].any()
    assert len(set(cache.addresses().values())) == 8
    assert cache.lengths.tolist() == [0, 0, 0]


def filled(bundle, batch, num_beams, lengths):
    """Every value is another; the prompts are in the first rows, as after a prefill."""
    cache = KVCache(bundle, batch, num_beams)
    for index, name in enumerate(cache):
        cache[name][:] = np.arange(cache[name].size, dtype=np.float32).reshape(cache[name].shape) + index / 8
    cache.lengths[:batch] = lengths
    return cache


def test_prefill_is_bound_to_the_first_rows(bundle):
    cache, session = KVCache(bundle, 2, 3), Bindings()
    cache.bind(session, slice(2))
    for name in cache:
        assert session[f"past_key_values.{name}"] is session[f"present.{name}"]
        assert session[f"present.{name}"].shape == (2, 2, 64, 8)
        assert session[f"present.{name}"].ctypes.data == cache.addresses()[name]
    assert cache.lengths.tolist() == [0] * 6


@pytest.mark.parametrize(("batch", "num_beams"), [(1, 1), (3, 1), (1, 4), (2, 2), (3, 2), (2, 5), (4, 3)])
def test_every_beam_gets_the_prefill_of_its_request_and_no_more(bundle, batch, num_beams):
    lengths = np.arange(batch) * 3 + 1
    cache = filled(bundle, batch, num_beams, lengths)
    before = {name: cache[name].copy() for name in cache}
    cache.spread()
    assert cache.lengths.tolist() == np.repeat(lengths, num_beams).tolist()
    for name, old in before.items():
        for row in range(batch * num_beams):
            used = lengths[row // num_beams]
            np.testing.assert_array_equal(cache[name][row, :, :used], old[row // num_beams, :, :used])
            np.testing.assert_array_equal(cache[name][row, :, used:], old[row, :, used:])


@given(data=st.data(), batch=st.integers(1, 3), num_beams=st.integers(1, 6))
def test_rows_are_reordered_as_if_all_at_once(data, batch, num_beams):
    bundle = SimpleNamespace(
        model=SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, head_dim=2),
        kv_cache=SimpleNamespace(capacity=7, dtype="float32"),
        components={"decoder_decode": SimpleNamespace(inputs={})},
    )
    prompts = data.draw(st.lists(st.integers(1, 4), min_size=batch, max_size=batch))
    cache = filled(bundle, batch, num_beams, prompts)
    cache.spread()
    cache.lengths += np.repeat(data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch)), num_beams)
    beams = st.lists(st.integers(0, num_beams - 1), min_size=num_beams, max_size=num_beams)
    sources = np.concatenate([request * num_beams + np.array(data.draw(beams)) for request in range(batch)])
    before, lengths = {name: cache[name].copy() for name in cache}, cache.lengths.copy()
    cache.reorder(sources)
    for name, old in before.items():
        for row, source in enumerate(sources):
            used = lengths[row]
            np.testing.assert_array_equal(cache[name][row, :, :used], old[source, :, :used])
            np.testing.assert_array_equal(cache[name][row, :, used:], old[row, :, used:])
    np.testing.assert_array_equal(cache.lengths, lengths)


@given(sources=st.integers(1, 7).flatmap(lambda rows: st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
def test_only_rows_that_change_are_written_each_once(sources):
    moves = _moves(sources)
    written = sorted(target for target, _ in moves if target >= 0)
    assert written == [row for row, source in enumerate(sources) if row != source]
    circles = {frozenset(circle) for row in range(len(sources)) if (circle := circle_of(row, sources))}
    assert len(moves) - len(written) == sum(len(circle) > 1 for circle in circles)


def circle_of(row, sources):
    """The rows from this one through sources back to it; none when the way does not come back."""
    way = [row]
    while (row := sources[way[-1]]) not in way:
        way.append(row)
    return way if row == way[0] else []


def test_rows_beyond_the_system_are_an_error(bundle):
    with pytest.raises(MissingDependency, match="no room for a key or value buffer") as caught:
        KVCache(bundle, 1, 10**15)
    assert "fewer beams" in caught.value.hint


LAZY = """
import numpy as np
from moiie_runtime.kv_cache import _lazy_zeros
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = anonymous()
buffer = _lazy_zeros((1, 32, 4096, 96), np.dtype("float32"))
buffer[:, :, :10] = 1
assert buffer[:, :, 10:].max() == 0
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_taken_as_tokens_arrive():
    output = subprocess.run([sys.executable, "-c", LAZY], check=True, capture_output=True, text=True).stdout
    assert int(output) < 4096  # KiB of 49152; with huge pages the first token takes nearly all of it
