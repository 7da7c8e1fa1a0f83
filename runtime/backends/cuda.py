"""The memory of an NVIDIA GPU, by CUDA's driver API: a `Device` and its buffers."""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from typing import Any

import numpy as np

from moiie_runtime.backends.cuda_driver import OUT_OF_MEMORY, CudaError, call, driver
from moiie_runtime.backends.device import ITEM_BYTES, Array, DeviceBuffer, DeviceMemory, on_host, storage, stored
from moiie_runtime.backends.gpu_info import NUMBERS, gpus_here
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.sizes import readable

_log = logging.getLogger(__name__)
_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: the stream does not wait for what other libraries do on the default one."""


class CudaDevice:
    """A GPU as a `Device`; see there for the methods.

    It uses the GPU's primary context, like TensorRT, ONNX Runtime and PyTorch in the same process.

    Args:
        index: which of the GPUs that the process sees.

    Raises:
        MissingDependency: cuda-bindings or a driver is missing, or there is no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        self.lock = threading.RLock()
        self.index = index
        self._closed = False
        self._sizes: dict[int, int] = {}  # bytes of every allocation by its address
        self._locked: dict[int, int] = {}  # the same for page-locked host memory
        call("cuInit", 0)
        count = int(call("cuDeviceGetCount"))
        if index >= count:
            raise MissingDependency(f"CUDA: there is no GPU {index} here: {gpus_here(range(count))}", NUMBERS)
        self._handle = call("cuDeviceGet", index)
        self.name = f"{_text(call('cuDeviceGetName', 128, self._handle))} (CUDA device {index})"
        self._context = call("cuDevicePrimaryCtxRetain", self._handle)
        self.activate()
        self.stream = int(call("cuStreamCreate", _NON_BLOCKING))

    def activate(self) -> None:
        """See `Device`."""
        if self._closed:
            raise MoiieError(f"{self.name}: the device is closed", "load the bundle again")
        call("cuCtxSetCurrent", self._context)

    def empty(self, shape: tuple[int, ...], dtype: str, what: str) -> CudaBuffer:
        """See `Device`."""
        size = math.prod(shape) * ITEM_BYTES[dtype]
        with self.lock:
            self.activate()
            try:
                address = int(call("cuMemAlloc", max(1, size)))
            except CudaError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                raise self._no_room(size, what) from error
            self._sizes[address] = size
        return CudaBuffer(self, address, shape, dtype)

    def upload(self, array: Array, what: str, dtype: str | None = None) -> CudaBuffer:
        """See `Device`."""
        buffer = self.empty(array.shape, array.dtype.name if dtype is None else dtype, what)
        buffer.write(array)
        return buffer

    def page_locked(self, size: int) -> PageLocked:
        """Host memory that the GPU copies to and from by itself.

        Raises:
            MissingDependency: the system has no room.
        """
        with self.lock:
            self.activate()
            try:
                address = int(call("cuMemHostAlloc", max(1, size), 0))
            except CudaError as error:
                raise MissingDependency(
                    f"{self.name}: no {readable(size)} of page-locked host memory: {error.message}", "free some memory"
                ) from error
            self._locked[address] = size
        return PageLocked(self, address, size)

    def synchronize(self) -> None:
        """See `Device`."""
        with self.lock:
            self.activate()
            call("cuStreamSynchronize", self.stream)

    def memory(self) -> DeviceMemory:
        """See `Device`."""
        with self.lock:
            self.activate()
            free, total = call("cuMemGetInfo")
            return DeviceMemory(int(free), int(total), sum(self._sizes.values()))

    def close(self) -> None:
        """See `Device`."""
        with self.lock:
            if self._closed:
                return
            self.activate()
            for address in list(self._sizes):
                self.release(address)
            for address in list(self._locked):
                self.unlock(address)
            call("cuStreamDestroy", self.stream)
            self._closed = True
            call("cuDevicePrimaryCtxRelease", self._handle)

    def release(self, address: int) -> None:
        """Free what `empty` gave at this address; nothing when it was freed before."""
        with self.lock:
            if self._sizes.pop(address, None) is not None:
                self.activate()
                call("cuMemFree", address)

    def unlock(self, address: int) -> None:
        """Free what `page_locked` gave at this address; nothing when it was freed before."""
        with self.lock:
            if self._locked.pop(address, None) is not None:
                self.activate()
                call("cuMemFreeHost", address)

    def _no_room(self, size: int, what: str) -> MissingDependency:
        memory = self.memory()
        return MissingDependency(
            f"{self.name}: no room for {what}: {readable(size)} were asked for, {readable(memory.free)} of "
            f"{readable(memory.total)} are free (this model holds {readable(memory.allocated)})",
            "end other programs on the GPU, ask for a smaller batch or fewer beams, or export with a smaller max_context",
        )


class CudaBuffer:
    """Memory of a `CudaDevice` as a `DeviceBuffer`; see there for the methods."""

    def __init__(
        self, device: CudaDevice, address: int, shape: tuple[int, ...], dtype: str, whole: bool = True
    ) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self._device = device
        self._whole = whole

    @property
    def nbytes(self) -> int:
        """See `DeviceBuffer`."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def rows(self, first: int, last: int) -> CudaBuffer:
        """See `DeviceBuffer`."""
        if not 0 <= first <= last <= self.shape[0]:
            raise MoiieError(f"a buffer of {self.shape[0]} rows has no rows {first}:{last}")
        row = self.nbytes // max(1, self.shape[0])
        return CudaBuffer(
            self._device, self.address + first * row, (last - first, *self.shape[1:]), self.dtype, whole=False
        )

    def copy_positions(
        self, target_row: int, source: DeviceBuffer, source_row: int, positions: tuple[int, int]
    ) -> None:
        """See `DeviceBuffer`."""
        if (self.shape[1:], self.dtype) != (source.shape[1:], source.dtype) or len(self.shape) != 4:
            raise MoiieError(
                f"positions cannot be copied from {source.shape} {source.dtype} to {self.shape} {self.dtype}"
            )
        first, last = positions
        _, heads, capacity, head_dim = self.shape
        if not (0 <= first <= capacity and last <= capacity):
            raise MoiieError(f"a buffer for {capacity} tokens has no positions {first}:{last}")
        if first >= last or not heads:
            return
        token = head_dim * ITEM_BYTES[self.dtype]
        pitch = capacity * token
        begin = [row * heads * pitch + first * token for row in (target_row, source_row)]
        self._device_copy(self.address + begin[0], source.address + begin[1], ((last - first) * token, heads), pitch)

    def write(self, array: Array) -> None:
        """See `DeviceBuffer`."""
        if array.shape != self.shape:
            raise MoiieError(f"a device buffer {list(self.shape)} cannot be filled with an array {list(array.shape)}")
        raw = stored(array, self.dtype)
        with self._device.lock:
            self._device.activate()
            if raw.nbytes:
                call("cuMemcpyHtoDAsync", self.address, raw.ctypes.data, raw.nbytes, self._device.stream)
            call("cuStreamSynchronize", self._device.stream)  # a page-locked array would still be read

    def clear(self) -> None:
        """See `DeviceBuffer`."""
        with self._device.lock:
            self._device.activate()
            if self.nbytes:
                call("cuMemsetD8Async", self.address, 0, self.nbytes, self._device.stream)

    def numpy(self) -> Array:
        """See `DeviceBuffer`."""
        raw = np.empty(self.shape, storage(self.dtype))
        with self._device.lock:
            self._device.activate()
            if raw.nbytes:
                call("cuMemcpyDtoHAsync", raw.ctypes.data, self.address, raw.nbytes, self._device.stream)
            call("cuStreamSynchronize", self._device.stream)
        return on_host(raw, self.dtype)

    def free(self) -> None:
        """See `DeviceBuffer`."""
        if self._whole:
            self._device.release(self.address)

    def _device_copy(self, target: int, source: int, block: tuple[int, int], pitch: int) -> None:
        """Copy `block`, bytes by rows that lie `pitch` bytes apart."""
        width, height = block
        with self._device.lock:
            self._device.activate()
            try:
                call("cuMemcpy2DAsync", _copy_2d(target, source, block, pitch), self._device.stream)
            except CudaError as error:  # CUDA promises such copies only for the pitches it chose itself
                _log.debug("copying row by row: %s", error.message)
                for offset in range(0, height * pitch, pitch):
                    call("cuMemcpyDtoDAsync", target + offset, source + offset, width, self._device.stream)


class PageLocked:
    """Page-locked host memory.

    Attributes:
        address: of its first byte.
        bytes: it, as an array of uint8.
    """

    def __init__(self, device: CudaDevice, address: int, size: int) -> None:
        self.address = address
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(address))
        self._device = device

    def free(self) -> None:
        """Give it back; freeing twice does nothing. It must not be used afterwards."""
        self._device.unlock(self.address)


def _copy_2d(target: int, source: int, block: tuple[int, int], pitch: int) -> Any:
    cuda = driver()
    copy = cuda.CUDA_MEMCPY2D()
    copy.srcMemoryType = copy.dstMemoryType = cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.dstDevice = cuda.CUdeviceptr(source), cuda.CUdeviceptr(target)
    copy.srcPitch = copy.dstPitch = pitch
    copy.WidthInBytes, copy.Height = block
    return copy


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")
