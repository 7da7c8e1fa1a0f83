"""The GPU of this machine, as a builder needs it."""

from __future__ import annotations

from moiie_runtime.backends.gpu_info import find_driver


def device_sm() -> int | None:
    """Compute capability of the first GPU times ten, 87 for Orin; None without a driver or a GPU."""
    driver = find_driver()
    return driver.gpus[0].sm if driver is not None and driver.gpus else None
