"""A `Device` whose memory is the host's, for tests of what runs on an accelerator elsewhere; it notices misuse."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from moiie_runtime.backends import onnxruntime_cuda
from moiie_runtime.backends.device import Array, DeviceMemory, on_host, storage, stored
from moiie_runtime.backends.session import EngineOptions
from moiie_runtime.engines import Engine

TOTAL = 1 << 30


class HostDevice:
    """Memory that knows what was given out and what came back."""

    def __init__(self) -> None:
        self.name = "emulated device"
        self.index = 0
        self.stream = 0
        self.lock = threading.RLock()
        self.closed = False
        self.held: dict[int, int] = {}
        """Bytes of every buffer by its address."""
        self.peak = 0

    def activate(self) -> None:
        assert not self.closed, "the device was closed"

    def empty(self, shape: tuple[int, ...], dtype: str, what: str) -> HostBuffer:
        self.activate()
        return HostBuffer(self, np.full(shape, 0x7F, np.uint8).astype(storage(dtype)), dtype, whole=True)

    def upload(self, array: Array, what: str, dtype: str | None = None) -> HostBuffer:
        buffer = self.empty(array.shape, array.dtype.name if dtype is None else dtype, what)
        buffer.write(array)
        return buffer

    def synchronize(self) -> None:
        self.activate()

    def memory(self) -> DeviceMemory:
        allocated = sum(self.held.values())
        return DeviceMemory(TOTAL - allocated, TOTAL, allocated)

    def close(self) -> None:
        self.closed = True


class HostBuffer:
    """A part of it."""

    def __init__(self, device: HostDevice, raw: Array, dtype: str, whole: bool) -> None:
        self._device, self._raw, self.dtype, self._whole = device, raw, dtype, whole
        if whole:
            device.held[self.address] = raw.nbytes
            device.peak = max(device.peak, sum(device.held.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._live().shape

    @property
    def nbytes(self) -> int:
        return int(self._live().nbytes)

    @property
    def address(self) -> int:
        return int(self._live().ctypes.data)

    def rows(self, first: int, last: int) -> HostBuffer:
        return HostBuffer(self._device, self._live()[first:last], self.dtype, whole=False)

    def copy_positions(self, target_row: int, source: Any, source_row: int, positions: tuple[int, int]) -> None:
        first, last = positions
        self._live()[target_row, :, first:last] = source._live()[source_row, :, first:last]

    def write(self, array: Array) -> None:
        assert array.shape == self.shape
        self._live()[...] = stored(array, self.dtype)

    def clear(self) -> None:
        self._live()[...] = 0

    def numpy(self) -> Array:
        return on_host(self._live().copy(), self.dtype)

    def free(self) -> None:
        if self._whole and self._raw is not None:
            del self._device.held[self.address]
            self._raw = None

    def _live(self) -> Array:
        assert self._raw is not None, "the buffer was freed"
        self._device.activate()
        return self._raw


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[HostDevice]:
    """Let target `ort-cuda` run on the CPU provider; returns the devices that are opened, as they are."""
    opened: list[HostDevice] = []
    provider = onnxruntime_cuda.Provider("CPUExecutionProvider", "cpu", "cpu")

    def prepare(engine: Engine) -> EngineOptions:
        opened.append(HostDevice())
        weights = onnxruntime_cuda.OrtWeights(engine.bundle, provider)
        after = onnxruntime_cuda.released_components(engine)
        return EngineOptions(device=opened[-1], shared=weights, after_prefill=after)

    monkeypatch.setattr(onnxruntime_cuda, "prepare", prepare)
    return opened
