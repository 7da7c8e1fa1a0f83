from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.kv_cache import KVCache


@pytest.fixture
def bundle(manifest, write_bundle) -> Bundle:
    return Bundle.open(write_bundle(manifest))


class Bindings(dict):
    """Stands for a session and notes what is bound."""

    bind = dict.__setitem__


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
