"""The package cuda-bindings as it is, over a driver in host memory (libcuda_stub.c): what we pass is what it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = """
import numpy as np
from moiie_runtime.backends.cuda import CudaDevice
from moiie_runtime.backends.cuda_graph import CudaGraph
from moiie_runtime.backends.gpu_info import find_driver
from moiie_runtime.errors import MissingDependency

driver = find_driver()
assert (driver.cuda, driver.gpus[0].name, driver.gpus[0].sm, driver.gpus[0].memory) == ((13, 0), "Stub GPU", 87, 1 << 20)
device = CudaDevice()
array = np.random.default_rng(0).standard_normal((3, 2, 5, 4)).astype(np.float16)
source, target = device.upload(array, "a test"), device.empty(array.shape, "float16", "a test")
np.testing.assert_array_equal(source.rows(1, 2).numpy(), array[1:2])
target.clear()
target.copy_positions(2, source, 0, (1, 4))
expected = np.zeros_like(array)
expected[2, :, 1:4] = array[0, :, 1:4]
np.testing.assert_array_equal(target.numpy(), expected)
locked = device.page_locked(10)
locked.bytes[:] = 3
locked.free()
graph = CudaGraph(device, target.clear)
graph.launch()
graph.close()
device.synchronize()
try:
    device.empty((1 << 20,), "int8", "a test")
except MissingDependency as error:
    print(error.message)
source.free()
print(device.memory())
device.close()
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1."""
    if find_spec("cuda") is None or shutil.which("cc") is None or not sys.platform.startswith("linux"):
        if os.environ.get("CI") == "true":
            pytest.fail("needs a C compiler and cuda-bindings: pip install 'moiie-export[tensorrt]'", pytrace=False)
        pytest.skip("no C compiler or no cuda-bindings")
    folder = tmp_path_factory.mktemp("libcuda")
    source = Path(__file__).with_name("libcuda_stub.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source, "-ldl"], check=True)
    return folder


def test_every_call_arrives_as_the_driver_wants_it(stub: Path) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no room for a test: 1.0 MiB were asked for, 1023.5 KiB of 1.0 MiB are free" in done.stdout
    assert "free=1048336, total=1048576, allocated=240" in done.stdout
