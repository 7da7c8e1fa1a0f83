"""The GPU of this machine, as a builder needs it."""

from __future__ import annotations

from moiie_runtime.backends.gpu_info import find_driver


def device_sm() -> int | None:
    """Compute capability of GPU 0, which TensorRT builds for, times ten, 87 for Orin; None where there is none."""
    driver = find_driver()
    gpu = None if driver is None else driver.gpu(0)
    return None if gpu is None else gpu.sm
