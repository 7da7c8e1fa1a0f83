"""The process that builds an engine, without TensorRT."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASKS = """
import ctypes, json
from moiie_export.builders import engine_process

def load(_):
    signal = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(signal))  # PR_GET_PDEATHSIG
    print(signal.value)
    raise SystemExit(0)

json.load = load
engine_process.main()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of Linux")
def test_it_is_killed_with_the_process_that_asked() -> None:
    """SIGKILL, set before the job is read, in the program that `main` starts again for the sake of its addresses."""
    done = subprocess.run([sys.executable, "-c", _ASKS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "9"
