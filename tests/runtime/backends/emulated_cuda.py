"""An emulation of `cuda.bindings.driver` in host memory, for machines without a GPU. It proves logic, not speed.

Work is queued on a stream and done when something waits for it, as late as a GPU may; page-locked host memory is read and
written then, other host memory when the call is made. Every access is checked against live allocations, new memory is full
of NaNs, freed memory is never given again unless asked for, and recording a stream refuses what CUDA refuses there.
"""

# ruff: noqa: N802 - the driver's names

from __future__ import annotations

import ctypes
import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256
POISON = 0xFF
"""Bytes of new and of freed memory: NaN in every float."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Failure(Exception):
    """Becomes the error code of a call."""

    def __init__(self, code: CUresult) -> None:
        super().__init__(code.name)
        self.code = code


class Handle(int):
    """What the package wraps handles and pointers in."""


@dataclass
class Block:
    """An allocation."""

    size: int
    memory: np.ndarray[Any, Any]
    live: bool = True


@dataclass
class Stream:
    """Work in order, or a recording of it."""

    queue: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    broken: bool = False


class EmulatedCuda:
    """The module `cuda.bindings.driver`, and what a test wants to know of it.

    Attributes:
        total: bytes of the device.
        calls: how often each function was called.
        reuse: whether a freed address may be given again.
        devices: how many GPUs there are.
        used_device: the one whose context was retained last.
        refuse_2d: whether 2D copies fail, as CUDA allows itself for pitches it did not choose.
    """

    CUDA_VERSION = 13000
    CUresult = CUresult
    CUdeviceptr = Handle
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUDA_MEMCPY2D = SimpleNamespace

    def __init__(self, total: int = 64 << 20) -> None:
        self.total = total
        self.calls: Counter[str] = Counter()
        self.reuse = False
        self.devices = 1
        self.used_device: int | None = None
        self._peak = 0
        self.refuse_2d = False
        self._blocks: dict[int, Block] = {}
        self._locked: dict[int, Block] = {}
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._contexts = 0
        self._current = False
        self._next = 1000

    def __getattr__(self, name: str) -> Any:
        work = getattr(type(self), f"_{name}", None)
        if work is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            try:
                found = work(self, *arguments)
            except Failure as failure:
                return (failure.code, None)
            values = () if found is None else found if isinstance(found, tuple) else (found,)
            return (CUresult.CUDA_SUCCESS, *values)

        return call

    @property
    def used(self) -> int:
        """Bytes of the device that are allocated."""
        return sum(block.size for block in self._blocks.values() if block.live)

    @property
    def peak(self) -> int:
        """The most that was allocated at once."""
        return self._peak

    @property
    def left(self) -> dict[str, int]:
        """What was not given back."""
        locked = sum(block.size for block in self._locked.values() if block.live)
        return {
            "device": self.used,
            "page-locked": locked,
            "streams": len(self._streams),
            "graphs": len(self._graphs),
            "contexts": self._contexts,
        }

    # Used by the emulation of TensorRT too.

    def take(self, size: int) -> int:
        """Address of new device memory."""
        if self.used + size > self.total:
            raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        self._peak = max(self._peak, self.used + size)
        if self.reuse:
            for address, block in self._blocks.items():
                if not block.live and block.size == size:
                    block.live = True
                    block.memory[:] = POISON
                    return address
        return self._new(self._blocks, size)

    def give(self, address: int) -> None:
        """Free device memory, after all work is done."""
        for stream in self._streams.values():
            self._refuse_recording(stream)
            self._finish(stream)
        block = self._blocks.get(int(address))
        if block is None or not block.live:
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        block.live = False
        block.memory[:] = POISON

    def view(self, address: int, size: int, locked: bool = False) -> np.ndarray[Any, Any]:
        """The bytes at an address, all inside one live allocation."""
        for start, block in (self._locked if locked else self._blocks).items():
            if block.live and start <= address and address + size <= start + block.size:
                return block.memory[address - start : address - start + size]
        raise Failure(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        """Queue or record work."""
        found = self._stream(stream)
        if found.recording is not None:
            found.recording.append(work)
        else:
            found.queue.append(work)

    def recording(self, stream: int) -> bool:
        """Whether the stream is recorded now."""
        return self._stream(stream).recording is not None

    def spoil(self, stream: int) -> None:
        """Something forbidden happened while the stream was recorded."""
        self._stream(stream).broken = True

    def _new(self, blocks: dict[int, Block], size: int) -> int:
        raw = np.full(size + ALIGNMENT, POISON, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        address = raw.ctypes.data + offset
        blocks[address] = Block(size, raw[offset : offset + size])
        return address

    def _stream(self, handle: int) -> Stream:
        stream = self._streams.get(int(handle))
        if stream is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return stream

    def _finish(self, stream: Stream) -> None:
        queue, stream.queue = stream.queue, []
        for work in queue:
            work()

    def _refuse_recording(self, stream: Stream) -> None:
        if stream.recording is not None:
            stream.broken = True
            raise Failure(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def _need_context(self) -> None:
        if not self._current:
            raise Failure(CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def _handle(self) -> Handle:
        self._next += 1
        return Handle(self._next)

    def _host(self, address: int, size: int) -> tuple[np.ndarray[Any, Any], bool]:
        """Host bytes, and whether they are page-locked."""
        try:
            return self.view(int(address), size, locked=True), True
        except Failure:
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address))), False

    # The functions of the driver.

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDeviceGetCount(self) -> int:
        return self.devices

    def _cuDeviceGet(self, index: int) -> Handle:
        if not 0 <= index < self.devices:
            raise Failure(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return Handle(index)

    def _cuDeviceGetName(self, size: int, device: Any) -> bytes:
        return b"Emulated GPU".ljust(size, b"\0")

    def _cuDevicePrimaryCtxRetain(self, device: Any) -> Handle:
        self._contexts += 1
        self.used_device = int(device)
        return Handle(7)

    def _cuDevicePrimaryCtxRelease(self, device: Any) -> None:
        self._contexts -= 1
        self._current = False

    def _cuCtxSetCurrent(self, context: Any) -> None:
        assert int(context) == 7
        self._current = True

    def _cuMemGetInfo(self) -> tuple[int, int]:
        self._need_context()
        return self.total - self.used, self.total

    def _cuStreamCreate(self, flags: int) -> Handle:
        self._need_context()
        assert flags == 1
        handle = self._handle()
        self._streams[int(handle)] = Stream()
        return handle

    def _cuStreamDestroy(self, stream: Any) -> None:
        self._finish(self._stream(stream))
        del self._streams[int(stream)]

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self._need_context()
        found = self._stream(stream)
        self._refuse_recording(found)
        self._finish(found)

    def _cuMemAlloc(self, size: int) -> Handle:
        self._need_context()
        for stream in self._streams.values():
            self._refuse_recording(stream)
        return Handle(self.take(size))

    def _cuMemFree(self, address: Any) -> None:
        self._need_context()
        self.give(int(address))

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        self._need_context()
        return self._new(self._locked, size)

    def _cuMemFreeHost(self, address: int) -> None:
        self._locked[int(address)].live = False

    def _cuMemsetD8Async(self, address: Any, value: int, size: int, stream: Any) -> None:
        self.put(stream, lambda: self.view(int(address), size).fill(value))

    def _cuMemcpyHtoDAsync(self, target: Any, source: int, size: int, stream: Any) -> None:
        host, locked = self._host(source, size)
        if not locked:
            self._refuse_recording(self._stream(stream))
            host = host.copy()
        self.put(stream, lambda: np.copyto(self.view(int(target), size), host))

    def _cuMemcpyDtoHAsync(self, target: int, source: Any, size: int, stream: Any) -> None:
        host, locked = self._host(target, size)
        self.put(stream, lambda: np.copyto(host, self.view(int(source), size)))
        if not locked:
            self._refuse_recording(self._stream(stream))
            self._finish(self._stream(stream))

    def _cuMemcpyDtoDAsync(self, target: Any, source: Any, size: int, stream: Any) -> None:
        self.put(stream, lambda: np.copyto(self.view(int(target), size), self.view(int(source), size).copy()))

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> None:
        if self.refuse_2d or max(copy.srcPitch, copy.dstPitch) >= 2**31:
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        assert copy.srcMemoryType == copy.dstMemoryType == 2
        width, height = copy.WidthInBytes, copy.Height

        def work() -> None:
            rows = [self.view(int(copy.srcDevice) + i * copy.srcPitch, width).copy() for i in range(height)]
            for i, row in enumerate(rows):
                self.view(int(copy.dstDevice) + i * copy.dstPitch, width)[:] = row

        self.put(stream, work)

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        found = self._stream(stream)
        found.recording, found.broken = [], False

    def _cuStreamEndCapture(self, stream: Any) -> Handle:
        found = self._stream(stream)
        work, found.recording = found.recording, None
        if work is None or found.broken:
            raise Failure(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        handle = self._handle()
        self._graphs[int(handle)] = work
        return handle

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> Handle:
        handle = self._handle()
        self._graphs[int(handle)] = list(self._graphs[int(graph)])
        return handle

    def _cuGraphDestroy(self, graph: Any) -> None:
        del self._graphs[int(graph)]

    def _cuGraphExecDestroy(self, executable: Any) -> None:
        del self._graphs[int(executable)]

    def _cuGraphLaunch(self, executable: Any, stream: Any) -> None:
        for work in self._graphs[int(executable)]:
            self.put(stream, work)

    def _cuGetErrorString(self, code: CUresult) -> bytes:
        return f"said by the emulation of {code.name}".encode()
