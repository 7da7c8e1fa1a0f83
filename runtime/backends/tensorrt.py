"""Engines of TensorRT and TensorRT for RTX, with the KV cache and the experts on the device bound by address.

The runtime owns every buffer. A decode step has fixed shapes and runs as a CUDA graph: once as it is, recorded the second
time, launched from then on for as long as no address changes; where TensorRT or the driver cannot record it, it goes on as
it is, which is said in the log. A prefill runs in the smallest profile that holds it. Logits are copied once, into
page-locked host memory, and sampled there, by the sampler of all backends.

Not run on a GPU so far: tested against an emulation of the driver and of TensorRT (tests/runtime/backends).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from moiie_runtime.backends.cuda import CudaDevice
from moiie_runtime.backends.device import Array, DeviceBuffer
from moiie_runtime.backends.session import (
    PORTABLE_OPTIONS,
    EngineOptions,
    TensorSpec,
    check_array,
    check_feeds,
)
from moiie_runtime.backends.tensorrt_cache import KernelCache
from moiie_runtime.backends.tensorrt_checks import check_machine
from moiie_runtime.backends.tensorrt_context import Execution
from moiie_runtime.backends.tensorrt_io import Port, check_tensors, choose_profile, host_spec, read_profiles
from moiie_runtime.backends.tensorrt_shared import TensorRtShared, after_prefill
from moiie_runtime.errors import MoiieError

if TYPE_CHECKING:
    from moiie_runtime.engines import Engine


def prepare(engine: Engine) -> EngineOptions:
    """See that this machine can run an engine, and open its GPU.

    Raises:
        MissingDependency: what is missing first (see `check_machine`).
    """
    library = check_machine(engine)
    device = CudaDevice(engine.gpu)
    try:
        shared = TensorRtShared(engine, library, device)
    except BaseException:
        device.close()
        raise
    return EngineOptions(device=device, shared=shared, after_prefill=after_prefill(engine))


class TensorRtSession:
    """One engine. A `Session`; see there for the methods.

    Half precision is converted: its inputs and outputs are float32 here, as in the bundle's own graphs. Experts are bound
    by the session itself and are none of its inputs.

    Args:
        model: the engine's file.
        component: its name in the bundle.
        threads: of no use here.
        transient: whether it runs once a request; others are recorded as CUDA graphs.
        options: of `prepare`.

    Raises:
        MoiieError: the engine is damaged, or this is no built form of a bundle.
        MissingDependency: no room on the GPU.
    """

    def __init__(
        self,
        model: Path,
        *,
        component: str,
        threads: int | None = None,
        transient: bool = False,
        options: EngineOptions = PORTABLE_OPTIONS,
    ) -> None:
        del threads  # a GPU has its own
        if not isinstance(options.shared, TensorRtShared) or not isinstance(options.device, CudaDevice):
            raise MoiieError(f"{model}: TensorRT runs what `moiie build` made of a bundle, not its own graphs")
        self._where = f"{component} ({model})"
        self._component = component
        self._shared, self._device = options.shared, options.device
        described = self._shared.engine.bundle.components[component]
        document = self._shared.engine.document["components"][component]
        self._specs: dict[str, TensorSpec] = {**described.inputs, **described.outputs}
        banks = set(self._shared.banks.names(component))
        self.inputs = {name: host_spec(spec) for name, spec in described.inputs.items() if name not in banks}
        self.outputs = {name: host_spec(spec) for name, spec in described.outputs.items()}
        self._aliases: Mapping[str, str] = document.get("aliases") or {}
        self._profiles = read_profiles(document)
        self._moving = [name for name, spec in described.inputs.items() if any(isinstance(n, str) for n in spec.shape)]
        self._bound: dict[str, Array | DeviceBuffer] = {}
        self._scratch: dict[str, DeviceBuffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._engine: Any = self._shared.load(component, model)
        in_host = check_tensors(self._shared.trt, self._engine, self._where, self._specs)
        records = not transient and not self._moving
        self._execution = Execution(self._shared, self._engine, self._where, records, KernelCache(model))
        self._ports = {
            name: Port(self._device, name, self._specs[name].dtype, name in in_host)
            for name in (*self.inputs, *self.outputs)
        }

    def bind(self, name: str, array: Array | DeviceBuffer) -> None:
        """Tie an input, or an output that updates one, to a buffer on the device; or copy a host array in, now.

        Raises:
            MoiieError: no such input or output, or a buffer of another type or shape.
        """
        self._open()
        spec = self._specs.get(name)
        if name not in self._ports or spec is None:
            raise MoiieError(f"{self._where}: no input or output is called `{name}`")
        if isinstance(array, np.ndarray):
            if name not in self.inputs:
                raise MoiieError(f"{self._where}: output `{name}` cannot be bound to host memory")
            check_array(self._where, name, self.inputs[name], array)
            with self._device.lock:
                self._device.activate()
                self._device.synchronize()  # what was sent before may still be on its way
                self._ports[name].send(array)
        elif (array.dtype, array.shape) != (spec.dtype, spec.shape):
            found = TensorSpec(array.dtype, array.shape)
            raise MoiieError(f"{self._where}: `{name}` must be {spec} on the device, got {found}")
        self._bound[name] = array

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the engine once.

        Args:
            feeds: an array for each input that is not bound.
            outputs: names to return; None for all that are not bound.

        Returns:
            Arrays by name, owned by the caller.

        Raises:
            MoiieError: wrong feeds (see `check_feeds`), a size that no profile holds, an unknown output, or a failure
                inside TensorRT.
        """
        self._open()
        sizes = check_feeds(self._where, self.inputs, feeds, self._bound, {})
        wanted = [name for name in self.outputs if name not in self._bound] if outputs is None else list(outputs)
        for name in wanted:
            if name not in self.outputs or name in self._bound:
                raise MoiieError(f"{self._where}: no free output is called `{name}`")
        with self._device.lock:
            self._device.activate()
            self._shared.forget()
            if self._moving:
                profile = choose_profile(self._where, self._profiles, {name: size for name, (size, _) in sizes.items()})
                given = {**self._bound, **feeds}
                self._execution.set_shapes(profile, {name: given[name].shape for name in self._moving})
            for name, array in feeds.items():
                self._ports[name].send(array)
            if self._moving or not self._shapes:
                self._shapes = {name: self._execution.shape(name) for name in self.outputs}
            shapes = self._shapes
            self._execution.launch(self._addresses(shapes))
            self._write_back(feeds)
            for name in wanted:
                self._ports[name].fetch(shapes[name])
            self._device.synchronize()
            return {name: self._ports[name].take(shapes[name]) for name in wanted}

    def unbind(self) -> None:
        """Forget all buffers that were bound, so that their memory can go."""
        self._bound.clear()

    def close(self) -> None:
        """Release the engine and all buffers. Closing twice is allowed."""
        self.unbind()
        with self._device.lock:
            if self._engine is None:
                return
            self._device.activate()
            self._execution.close()
            self._engine = None
            for port in self._ports.values():
                port.close()
            while self._scratch:
                self._scratch.popitem()[1].free()

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        if self._engine is None:
            raise MoiieError(f"{self._where}: the session is closed")

    def _addresses(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Where every input and output lies; buffers of the session's own are made large enough."""
        found = {name: buffer.address for name, buffer in self._shared.banks.buffers(self._component).items()}
        for name in self.inputs:
            buffer = self._bound.get(name)
            found[name] = (
                self._ports[name].address if buffer is None or isinstance(buffer, np.ndarray) else buffer.address
            )
        for name, shape in shapes.items():
            source, buffer = self._aliases.get(name), self._bound.get(name)
            if source is not None:
                found[name] = found[source]
                if buffer is not None and not isinstance(buffer, np.ndarray) and buffer.address != found[source]:
                    raise MoiieError(f"{self._where}: {name} updates {source}, but another buffer is bound to it")
            elif buffer is not None:
                found[name] = self._scratch_of(name, shape).address
            else:
                self._ports[name].fit(shape)
                found[name] = self._ports[name].address
        return found

    def _scratch_of(self, name: str, shape: tuple[int, ...]) -> DeviceBuffer:
        """Where an output goes that is bound but, in this engine, cannot be written over its input."""
        if name not in self._scratch:
            self._scratch[name] = self._device.empty(shape, self._specs[name].dtype, f"the tensor {name}")
        return self._scratch[name]

    def _write_back(self, feeds: Mapping[str, Array]) -> None:
        """Bring the new positions of KV buffers that were not updated in place to where they are bound."""
        if not self._scratch:
            return
        tokens = feeds["inputs_embeds"].shape[1]
        for name, source in self._scratch.items():
            target = self._bound[name]
            assert not isinstance(target, np.ndarray)  # see bind
            for row, first in enumerate(feeds["past_lengths"].tolist()):
                target.copy_positions(row, source, row, (first, min(first + tokens, target.shape[2])))
