"""What these tests need on the machine: Triton, a C++ compiler, CMake and TensorRT's headers. CI has it all."""

from __future__ import annotations

import os
import shutil

import pytest

from moiie_plugins.headers import find_headers
from moiie_runtime.errors import MissingDependency
from tests.plugins.interpreter import HAS_TRITON


def _missing() -> str | None:
    tools = [name for name in ("g++", "cmake", "nm", "readelf") if shutil.which(name) is None]
    if not HAS_TRITON or tools:
        return "not installed: " + ", ".join([*tools, *([] if HAS_TRITON else ["triton"])])
    try:
        find_headers()
    except MissingDependency as error:
        return error.message
    return None


@pytest.fixture(autouse=True, scope="session")
def _needs_a_toolchain() -> None:
    missing = _missing()
    if missing is not None and os.environ.get("CI") != "true":
        pytest.skip(missing)
