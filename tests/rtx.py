"""TensorRT for RTX in tests: it builds engines without a GPU, so in CI its absence is a failure."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def need_rtx() -> None:
    """Skip the tests of a module where tensorrt-rtx is not installed; fail in CI."""
    if find_spec("tensorrt_rtx") is not None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("tensorrt-rtx is not installed: pip install 'moiie-export[tensorrt-rtx]'", pytrace=False)
    pytest.skip("tensorrt-rtx is not installed")
