from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.errors import MoiieError

CACHE = """<ir_version: 10, opset_import: ["" : 24]>
g (float[batch,2,8,4] past, float[batch,2,t,4] update, int64[batch] at)
  => (float[batch,2,8,4] present, float[batch] total, float[batch,2,t,4] doubled) {
  present = TensorScatter<axis=2>(past, update, at)
  axes = Constant<value_ints=[1,2,3]>()
  total = ReduceSum<keepdims=0>(present, axes)
  doubled = Add(update, update)
}"""


def model(text: str) -> bytes:
    return onnx.parser.parse_model(text).SerializeToString()


@pytest.fixture
def cache():
    with OnnxRuntimeSession(model(CACHE), component="cache", threads=1) as session:
        yield session


def feeds(batch=1, tokens=1):
    return {
        "past": np.zeros((batch, 2, 8, 4), np.float32),
        "update": np.ones((batch, 2, tokens, 4), np.float32),
        "at": np.full(batch, 3, np.int64),
    }


def test_metadata(cache):
    assert cache.inputs["update"] == TensorSpec("float32", ("batch", 2, "t", 4))
    assert cache.inputs["at"] == TensorSpec("int64", ("batch",))
    assert list(cache.outputs) == ["present", "total", "doubled"]


def test_run_returns_all_outputs_or_those_that_are_named(cache):
    assert list(cache.run(feeds())) == ["present", "total", "doubled"]
    found = cache.run(feeds(batch=2, tokens=3), ["total"])
    assert list(found) == ["total"]
    np.testing.assert_array_equal(found["total"], [24, 24])


def test_outputs_of_different_shapes_from_one_session_do_not_disturb_each_other(cache):
    first = cache.run(feeds(tokens=1), ["doubled"])["doubled"]
    second = cache.run(feeds(tokens=4), ["doubled"])["doubled"]
    cache.run({**feeds(tokens=4), "update": np.zeros((1, 2, 4, 4), np.float32)}, ["doubled"])
    assert first.shape == (1, 2, 1, 4)
    np.testing.assert_array_equal(second, np.full((1, 2, 4, 4), 2, np.float32))


def test_outputs_whose_size_only_the_run_knows():
    graph = model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (int64[1,m] at, float[n] y) { at = NonZero(x) y = Neg(x) }'
    )
    with OnnxRuntimeSession(graph, component="nonzero", threads=1) as session:
        for x in ([1, 0, 2], [0, 0], [3, 4, 5, 6]):
            found = session.run({"x": np.array(x, np.float32)})
            assert found["at"].tolist() == [[index for index, value in enumerate(x) if value]]
            assert found["y"].tolist() == [-value for value in x]


def test_a_buffer_bound_to_input_and_output_is_updated_in_place(cache):
    buffer = np.zeros((1, 2, 8, 4), np.float32)
    address = buffer.ctypes.data
    cache.bind("past", buffer)
    cache.bind("present", buffer)
    for step in range(3):
        given = {"update": np.full((1, 2, 1, 4), step + 1, np.float32), "at": np.array([step])}
        total = cache.run(given, ["total"])["total"]
        assert total == 8 * sum(range(step + 2))
        assert buffer.ctypes.data == address
    np.testing.assert_array_equal(buffer[0, 0, :, 0], [1, 2, 3, 0, 0, 0, 0, 0])
    assert set(cache.run(given)) == {"total", "doubled"}
    assert cache.run(given, ["present"])["present"] is buffer


def test_unbound_buffers_are_fed_again(cache):
    buffer = np.zeros((1, 2, 8, 4), np.float32)
    cache.bind("past", buffer)
    cache.unbind()
    with pytest.raises(MoiieError, match="input `past` .* was not given"):
        cache.run({name: array for name, array in feeds().items() if name != "past"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": np.zeros((1, 2, 8, 4))}, r"`past` must be float32\[batch, 2, 8, 4\], got float64\[1, 2, 8, 4\]"),
        ({"past": np.zeros((1, 2, 9, 4), np.float32)}, r"`past` must be .*, got float32\[1, 2, 9, 4\]"),
        ({"past": np.zeros((2, 8, 4), np.float32)}, r"`past` must be"),
        ({"past": [[0.0]]}, "`past` must be a numpy array .*, got list"),
        ({"at": np.zeros(2, np.int64)}, "`past` and `at` disagree about dimension `batch`: 1 and 2"),
        ({"extra": np.zeros(2, np.int64)}, "no input is called `extra`"),
    ],
)
def test_wrong_feeds_are_refused_by_name(cache, change, message):
    with pytest.raises(MoiieError, match=message) as caught:
        cache.run({**feeds(), **change})
    assert caught.value.message.startswith("cache: ")


def test_other_wrong_uses_are_refused(cache):
    with pytest.raises(MoiieError, match="input `past` .* was not given"):
        cache.run({})
    with pytest.raises(MoiieError, match="no output is called `other`"):
        cache.run(feeds(), ["other"])
    with pytest.raises(MoiieError, match="no input or output is called `other`"):
        cache.bind("other", np.zeros(1))
    with pytest.raises(MoiieError, match="`past` must be float32"):
        cache.bind("past", np.zeros((1, 2, 7, 4), np.float32))
    with pytest.raises(MoiieError, match="must be contiguous and writable"):
        cache.bind("past", np.zeros((1, 2, 8, 8), np.float32)[..., ::2])
    readonly = np.zeros((1, 2, 8, 4), np.float32)
    readonly.flags.writeable = False
    with pytest.raises(MoiieError, match="must be contiguous and writable"):
        cache.bind("present", readonly)
    cache.bind("past", np.zeros((1, 2, 8, 4), np.float32))
    with pytest.raises(MoiieError, match="`past` is bound to a buffer and was also fed"):
        cache.run(feeds())


def test_a_closed_session_says_so(cache):
    cache.close()
    cache.close()
    with pytest.raises(MoiieError, match="cache: the session is closed"):
        cache.run(feeds())


def test_failures_inside_onnx_runtime_name_the_component_and_leave_stderr_alone(tmp_path, capfd):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(MoiieError, match=r"decoder_decode \(.*broken\.onnx\): ONNX Runtime .* cannot load the graph"):
        OnnxRuntimeSession(path, component="decoder_decode", threads=1)
    reshape = model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x, int64[2] s) => (float[a,b] y) { y = Reshape(x, s) }'
    )
    with (
        OnnxRuntimeSession(reshape, component="reshape", threads=1) as session,
        pytest.raises(MoiieError, match="reshape: ONNX Runtime failed"),
    ):
        session.run({"x": np.zeros(5, np.float32), "s": np.array([2, 2])})
    assert capfd.readouterr().err == ""


def external_model(folder: Path, rows: int) -> bytes:
    """y = x @ w, w [rows, 1024] of ones in a file beside the graph."""
    weight = np.ones((rows, 1024), np.float32)
    (folder / "w.bin").write_bytes(weight.tobytes())
    graph = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[n,{rows}] x) => (float[n,1024] y) <float[{rows},1024] w> '
        "{ y = MatMul(x, w) }"
    )
    tensor = numpy_helper.from_array(weight[:0], "w")
    tensor.dims[:] = weight.shape
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    graph.graph.initializer.append(tensor)
    return graph.SerializeToString()


def test_external_data_beside_a_graph_given_as_bytes(tmp_path):
    data = external_model(tmp_path, 16)
    with OnnxRuntimeSession(data, component="x", threads=1, folder=tmp_path) as session:
        np.testing.assert_array_equal(session.run({"x": np.ones((1, 16), np.float32)})["y"], np.full((1, 1024), 16))
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(MoiieError, match="cannot load the graph"):
        OnnxRuntimeSession(data, component="x", threads=1, folder=tmp_path)


MAPPED = """
import sys, numpy as np
from pathlib import Path
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
path = Path(sys.argv[1])
x = np.ones((1, 16384), np.float32)
before = anonymous()
sessions = [OnnxRuntimeSession(path, threads=1) for _ in range(2)]
for session in sessions:
    assert (session.run({"x": x})["y"] == 16384).all()
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_weights_stay_mapped(tmp_path):
    path = tmp_path / "large.onnx"
    path.write_bytes(external_model(tmp_path, 16384))  # 64 MiB
    output = subprocess.run([sys.executable, "-c", MAPPED, path], check=True, capture_output=True, text=True).stdout
    assert int(output) < 16 * 1024  # KiB; a copy in either session would add 65536


def test_other_sessions_of_the_program_are_left_alone(cache):
    ordinary = onnxruntime.InferenceSession(model(CACHE), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(ordinary.run(["total"], feeds())[0], [8])


IDLE = """
import os, sys, time
from pathlib import Path
import numpy as np
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
x = np.ones((64, 4096), np.float32)
sessions = [OnnxRuntimeSession(Path(sys.argv[1]), threads=2) for _ in range(3)]
for session in sessions:
    session.run({"x": x})
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""


def test_idle_sessions_leave_the_cores_alone(tmp_path):
    path = tmp_path / "large.onnx"
    path.write_bytes(external_model(tmp_path, 4096))
    output = subprocess.run([sys.executable, "-c", IDLE, path], check=True, capture_output=True, text=True).stdout
    assert float(output) < 0.1  # seconds of CPU time in half a second; spinning threads take all of it
