"""An execution context of TensorRT: profile, shapes, addresses, and the CUDA graph of what does not change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from moiie_runtime.backends.cuda_graph import CudaGraph
from moiie_runtime.backends.tensorrt_cache import KernelCache
from moiie_runtime.backends.tensorrt_shared import TensorRtShared
from moiie_runtime.errors import MoiieError

_log = logging.getLogger(__name__)


class Execution:
    """Runs one engine on the device's stream. The device's lock is held while its methods are called.

    Args:
        shared: of all engines.
        engine: TensorRT's engine.
        where: for messages.
        records: whether to record a CUDA graph when a run is like the one before it.
        kernels: what was compiled for this engine before.

    Raises:
        MissingDependency: no room on the GPU.
    """

    def __init__(self, shared: TensorRtShared, engine: Any, where: str, records: bool, kernels: KernelCache) -> None:
        self._shared, self._where, self._records = shared, where, records
        self._stream = shared.device.stream
        self._size = int(getattr(engine, "device_memory_size_v2", 0) or getattr(engine, "device_memory_size", 0))
        strategy = shared.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        shared.device.activate()
        self._kernels = kernels
        self._context: Any = kernels.create_context(engine, strategy)
        if self._context is None:
            raise shared.refusal(f"{where}: TensorRT cannot make an execution context")
        self._profile = 0
        self._workspace = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._repeats = False
        self._graph: CudaGraph | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next run that changes nothing is a launch of a CUDA graph."""
        return self._graph is not None

    def set_shapes(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Choose a profile and the shapes of inputs with open dimensions.

        Raises:
            MoiieError: TensorRT refuses them.
        """
        if profile != self._profile:
            self._changed()
            if not self._context.set_optimization_profile_async(profile, self._stream):
                raise self._shared.failure(f"{self._where}: TensorRT refuses profile {profile}")
            self._profile = profile
            self._shapes.clear()  # a profile begins without any
            self._addresses.clear()
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._changed()
                if not self._context.set_input_shape(name, shape):
                    raise self._shared.failure(f"{self._where}: TensorRT refuses shape {list(shape)} of {name}")
                self._shapes[name] = shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output for the inputs' present shapes.

        Raises:
            MoiieError: it depends on the numbers, which the runtime has no use for.
        """
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise MoiieError(f"{self._where}: the shape of {name} is not known before the run: {list(shape)}")
        return shape

    def launch(self, addresses: Mapping[str, int]) -> None:
        """Put a run on the stream.

        Args:
            addresses: of every input and output.

        Raises:
            MoiieError: TensorRT refuses.
            MissingDependency: no room for intermediate results.
        """
        workspace = self._shared.workspace(self._size)
        if workspace != self._workspace:
            self._changed()
            self._set_workspace(workspace)
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._changed()
                if not self._context.set_tensor_address(name, address):
                    raise self._shared.failure(f"{self._where}: TensorRT refuses the buffer of {name}")
                self._addresses[name] = address
        if self._graph is None and self._repeats and self._records:
            self._record()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()
        self._repeats = True

    def close(self) -> None:
        """Release it, before its engine. Closing twice is allowed."""
        self._changed()
        self._kernels.save()
        self._context = None

    def _changed(self) -> None:
        """What was recorded holds no longer. TensorRT wants one run as it is before a recording."""
        self._repeats = False
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _set_workspace(self, address: int) -> None:
        if hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(address, self._size)
        else:  # TensorRT 10.0
            self._context.device_memory = address
        self._workspace = address

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._shared.failure(f"{self._where}: TensorRT failed")

    def _record(self) -> None:
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT for RTX knows beforehand
        try:
            if capturable is not None and not capturable(self._stream):
                raise MoiieError("TensorRT cannot run this engine inside a CUDA graph")
            self._graph = CudaGraph(self._shared.device, self._enqueue)
        except MoiieError as error:
            self._records = False
            _log.warning("%s: every step is launched by itself: no CUDA graph: %s", self._where, error.message)
