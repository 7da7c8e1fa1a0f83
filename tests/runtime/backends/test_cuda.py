"""Buffers on an emulated GPU: they hold what was put in, and all of them are given back."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_runtime.backends.cuda import CudaDevice
from moiie_runtime.backends.cuda_graph import CudaGraph
from moiie_runtime.backends.device import BFLOAT16, ITEM_BYTES, on_host, storage, stored
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.kv_cache import KVCache

MANY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def device(cuda):
    device = CudaDevice()
    yield device
    device.close()
    assert not any(cuda.left.values())


@given(st.lists(st.floats(width=32), min_size=1))
def test_bfloat16_is_rounded_as_everywhere(numbers):
    array = np.array(numbers, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = array.astype(ml_dtypes.bfloat16)
    bits = stored(array, BFLOAT16)
    np.testing.assert_array_equal(on_host(bits, BFLOAT16), expected.astype(np.float32))
    assert bits.dtype == storage(BFLOAT16)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_what_is_uploaded_comes_back(device, dtype):
    array = np.arange(24).reshape(2, 3, 4) % 2 if dtype == "bool" else np.arange(24).reshape(2, 3, 4)
    array = array.astype("float32" if dtype in ("float16", BFLOAT16) else dtype)
    buffer = device.upload(array.swapaxes(1, 2), "a test", dtype)
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((2, 4, 3), dtype, 24 * ITEM_BYTES[dtype])
    np.testing.assert_array_equal(buffer.numpy(), array.swapaxes(1, 2))
    np.testing.assert_array_equal(buffer.rows(1, 2).numpy(), array.swapaxes(1, 2)[1:])
    buffer.rows(0, 1).free()  # a part frees nothing
    buffer.clear()
    assert not buffer.numpy().any()
    buffer.free()
    buffer.free()
    assert device.memory().allocated == 0


@pytest.mark.parametrize("refused", [False, True])
@given(data=st.data())
@MANY
def test_positions_are_copied_as_in_numpy(device, cuda, refused, data):
    cuda.refuse_2d = refused
    sizes = [data.draw(st.integers(1, 4)) for _ in range(5)]
    rows, other, heads, capacity, dim = sizes
    arrays = [
        np.random.default_rng(n).standard_normal((n, heads, capacity, dim)).astype(np.float16) for n in (rows, other)
    ]
    row, source_row = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, other - 1))
    first, last = data.draw(st.integers(0, capacity)), data.draw(st.integers(0, capacity))
    target, source = (device.upload(array, "a test") for array in arrays)
    target.copy_positions(row, source, source_row, (first, last))
    arrays[0][row, :, first:last] = arrays[1][source_row, :, first:last]
    np.testing.assert_array_equal(target.numpy(), arrays[0])
    target.free()
    source.free()


def test_positions_outside_a_buffer_and_other_shapes_are_refused(device):
    buffer = device.empty((2, 2, 4, 8), "float16", "a test")
    for wanted in ((0, 5), (-1, 2)):
        with pytest.raises(MoiieError, match=f"for 4 tokens has no positions {wanted[0]}:{wanted[1]}"):
            buffer.copy_positions(0, buffer, 1, wanted)
    other = device.empty((2, 2, 5, 8), "float16", "a test")
    with pytest.raises(MoiieError, match="positions cannot be copied"):
        buffer.copy_positions(0, other, 1, (0, 1))
    with pytest.raises(MoiieError, match="no rows 1:3"):
        buffer.rows(1, 3)
    with pytest.raises(MoiieError, match="cannot be filled with an array"):
        buffer.write(np.zeros(3, np.float16))


def test_no_room_names_what_was_asked_for_and_what_is_there(device, cuda):
    kept = device.empty((cuda.total - 1024,), "uint8", "the rest")
    with pytest.raises(MissingDependency) as caught:
        device.empty((1, 512), "float32", "the KV cache")
    assert caught.value.message == (
        "Emulated GPU (CUDA device 0): no room for the KV cache: 2.0 KiB were asked for, 1.0 KiB of 64.0 MiB are free "
        "(this model holds 64.0 MiB)"
    )
    kept.free()
    assert device.empty((1, 512), "float32", "the KV cache").nbytes == 2048


def test_closing_gives_back_what_was_not_freed(cuda):
    device = CudaDevice()
    device.empty((7,), "int8", "a test")
    device.page_locked(100)
    assert device.memory().allocated == 7
    for _ in range(2):
        device.close()
    assert not any(cuda.left.values())
    with pytest.raises(MoiieError, match="the device is closed"):
        device.synchronize()


def test_a_gpu_that_is_not_there(cuda):
    with pytest.raises(MissingDependency, match="there is no GPU 1 here: there is one, GPU 0"):
        CudaDevice(1)


def test_what_was_recorded_is_done_at_every_launch(device, cuda):
    source, target = device.upload(np.zeros(4, np.int32), "a test"), device.upload(np.zeros(4, np.int32), "a test")
    before = cuda.calls["cuMemsetD8Async"]
    graph = CudaGraph(device, source.clear)
    assert cuda.calls["cuMemsetD8Async"] == before + 1
    for _ in range(2):
        source.write(np.arange(4, dtype=np.int32))
        graph.launch()
        assert not source.numpy().any()
    graph.close()
    graph.close()
    with pytest.raises(MoiieError, match="CAPTURE"):
        CudaGraph(device, lambda: device.empty((1,), "int8", "a test"))
    with pytest.raises(MoiieError, match="CAPTURE"):
        CudaGraph(device, device.synchronize)
    target.write(np.arange(4, dtype=np.int32))  # the stream is as before
    np.testing.assert_array_equal(target.numpy(), np.arange(4))


def bundle(rows=None):
    spec = SimpleNamespace(
        inputs={} if rows is None else {"past_key_values.0.key": SimpleNamespace(shape=(rows, 2, 7, 2))}
    )
    return SimpleNamespace(
        name="made",
        model=SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, head_dim=2),
        kv_cache=SimpleNamespace(capacity=7, dtype="float16"),
        components={"decoder_decode": spec},
    )


def filled(cache):
    for index, name in enumerate(cache):
        array = np.arange(cache.rows * 28, dtype=np.float32).reshape(cache.rows, 2, 7, 2) + index / 4
        buffer = cache._allocated()[name]
        if isinstance(buffer, np.ndarray):
            buffer[:] = array
        else:
            buffer.write(array)
    return cache


@given(data=st.data(), batch=st.integers(1, 2), num_beams=st.integers(1, 4), fixed=st.booleans())
@MANY
def test_a_cache_on_a_device_moves_rows_like_one_on_the_host(device, data, batch, num_beams, fixed):
    rows = batch * num_beams + data.draw(st.integers(0, 2)) if fixed else None
    prompts = data.draw(st.lists(st.integers(1, 4), min_size=batch, max_size=batch))
    grown = np.repeat(data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch)), num_beams)
    beams = st.lists(st.integers(0, num_beams - 1), min_size=num_beams, max_size=num_beams)
    sources = np.concatenate([request * num_beams + np.array(data.draw(beams)) for request in range(batch)])
    host, other = (filled(KVCache(bundle(rows), batch, num_beams, where)) for where in (None, device))
    for cache in (host, other):
        cache.lengths[:batch] = prompts
        cache.spread()
        cache.lengths += grown
        cache.reorder(sources)
    for name in host:
        np.testing.assert_array_equal(host[name], other[name])
    other.close()
    assert device.memory().allocated == 0


def test_a_cache_begins_with_zeros_and_only_when_it_is_bound(device):
    cache = KVCache(bundle(), 2, device=device)
    assert device.memory().allocated == 0
    bound = {}
    cache.bind(SimpleNamespace(bind=bound.__setitem__), slice(1))
    assert bound["past_key_values.0.key"].shape == (1, 2, 7, 2)
    assert bound["past_key_values.0.key"].address == bound["present.0.key"].address == cache.addresses()["0.key"]
    assert device.memory().allocated == 2 * 2 * 28 * 2
    assert not cache["0.key"].any()
    cache.close()
    assert device.memory().allocated == 0


def test_a_cache_that_does_not_fit_keeps_nothing(device, cuda):
    cuda.total = 150
    with pytest.raises(MissingDependency, match="no room for the KV cache"):
        KVCache(bundle(), 2, device=device).addresses()
    assert device.memory().allocated == 0


def test_constants_have_a_row_for_every_row_of_fixed_graphs(device):
    cache = KVCache(bundle(5), 2, 2, device)
    cache.constants = {"one": np.zeros((1, 3), np.float32), "each": np.arange(2, dtype=np.float32)[:, None]}
    bound = {}
    session = SimpleNamespace(bind=bound.__setitem__)
    cache.bind(session, slice(2))
    assert bound["each"].ravel().tolist() == [0, 1, 1, 1, 1]
    assert bound["one"].shape == (5, 3)
    cache.bind(session)
    assert bound["each"].ravel().tolist() == [0, 0, 1, 1, 1]
    assert bound["present.0.key"].shape == (5, 2, 7, 2)
    cache.close()
