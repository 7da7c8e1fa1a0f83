"""CUDA's driver API through the package cuda-bindings, releases 12 and 13: results checked, errors with their names."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from moiie_runtime.errors import MissingDependency, MoiieError

PIP = "pip install 'moiie-export[tensorrt]'; on CUDA 12 (JetPack 6): pip install 'cuda-bindings<13'"
OUT_OF_MEMORY = 2


class CudaError(MoiieError):
    """A call of the driver failed.

    Attributes:
        code: CUDA's number for the reason.
    """

    def __init__(self, function: str, code: int, reason: str) -> None:
        super().__init__(f"CUDA: {function} failed: {reason}", "see what `moiie doctor` says about the GPU")
        self.code = code


@cache
def driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        MissingDependency: cuda-bindings is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingDependency(f"the package cuda-bindings cannot be imported: {error}", PIP) from error


def release() -> int | None:
    """The CUDA release that cuda-bindings was made for, 12 or 13; None where it does not say."""
    version = getattr(driver(), "CUDA_VERSION", None)
    return None if version is None else int(version) // 1000


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the driver.

    Returns:
        What it returns behind the error code: nothing, one value, or a tuple.

    Raises:
        CudaError: it failed.
        MissingDependency: there is no driver, or it is too old to have the function.
    """
    try:
        code, *values = getattr(driver(), function)(*arguments)
    except RuntimeError as error:  # cuda-bindings finds no libcuda, or no such function in it
        raise MissingDependency(
            f"CUDA: {function}: {error}", "install NVIDIA's driver; `moiie doctor` says which one is there"
        ) from error
    if int(code) != 0:
        raise CudaError(function, int(code), _reason(code))
    return values[0] if len(values) == 1 else tuple(values) or None


def _reason(code: Any) -> str:
    said, text = driver().cuGetErrorString(code)
    name = getattr(code, "name", str(int(code)))
    return f"{name} ({text.decode()})" if int(said) == 0 and text else str(name)
