"""Work of a stream, recorded once and launched again as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from moiie_runtime.backends.cuda_driver import CudaError, call, driver
from moiie_runtime.backends.device import Device


class CudaGraph:
    """A recorded piece of work. What it touches must stay where it is for as long as it is launched.

    Args:
        device: whose stream it is recorded from and launched on.
        work: puts work on the stream; it must not wait for it.

    Raises:
        MoiieError: the work cannot be recorded; nothing of it was done then.
    """

    def __init__(self, device: Device, work: Callable[[], None]) -> None:
        self._device = device
        self._executable: Any = None
        with device.lock:
            device.activate()
            graph = _recorded(device.stream, work)
            try:
                self._executable = call("cuGraphInstantiate", graph, 0)
            finally:
                call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Put the work on the stream again."""
        with self._device.lock:
            self._device.activate()
            call("cuGraphLaunch", self._executable, self._device.stream)

    def close(self) -> None:
        """Forget it. Closing twice is allowed."""
        if self._executable is not None:
            with self._device.lock:
                self._device.activate()
                call("cuGraphExecDestroy", self._executable)
            self._executable = None


def _recorded(stream: int, work: Callable[[], None]) -> Any:
    # Other threads may allocate meanwhile; this one may not.
    call("cuStreamBeginCapture", stream, driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    try:
        work()
    except BaseException:
        with contextlib.suppress(CudaError):  # the stream leaves its recording state, whatever became of the record
            call("cuGraphDestroy", call("cuStreamEndCapture", stream))
        raise
    return call("cuStreamEndCapture", stream)
