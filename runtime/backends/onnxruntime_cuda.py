"""Engines of target `ort-cuda`: ONNX Runtime's CUDA provider, with the KV cache, inputs and weights in the GPU's memory.

Where it runs is a parameter: a `Provider` names the execution provider and the memory whose addresses it takes, and a
`Device` gives that memory. `prepare` makes the pair for an NVIDIA GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from moiie_runtime.backends.cuda import CudaDevice
from moiie_runtime.backends.device import Array, Device
from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions, TensorSpec
from moiie_runtime.backends.tensorrt_checks import find_gpu
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.sizes import readable
from moiie_runtime.tensors import TensorFile
from moiie_runtime.versions import version_numbers

try:
    import onnxruntime as ort

    from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
except ImportError as error:
    raise MissingDependency(
        f"the onnxruntime_cuda backend needs the package onnxruntime-gpu: {error}", 'pip install "moiie-export[gpu]"'
    ) from error

_log = logging.getLogger(__name__)
_CUDA = "CUDAExecutionProvider"
_NO_ROOM = re.compile(r"failed to allocate memory|out of memory|cudaErrorMemoryAllocation", re.IGNORECASE)
_SWAP = (
    'pip uninstall onnxruntime onnxruntime-gpu, then pip install "moiie-export[gpu]"; they must not both be installed'
)
_LIBRARIES = "install CUDA and cuDNN of the versions it names, for example: pip install 'onnxruntime-gpu[cuda,cudnn]'"


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: as ONNX Runtime calls it.
        memory: the kind of memory whose addresses may be bound, `cuda` or `cpu`.
        arena: where ONNX Runtime gets its own memory from, `gpu` or `cpu`.
        index: number of the device.
        settings: options of the provider.
    """

    name: str
    memory: str
    arena: str
    index: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


class OrtWeights:
    """The weights of an engine on its device: each once, for as long as an open session uses it. A `Shared`.

    Args:
        bundle: the bundle with the engine's graphs and weights in place.
        provider: says where they lie.
    """

    def __init__(self, bundle: Bundle, provider: Provider) -> None:
        self.provider = provider
        self._names = {name: bundle.residency[phase].weights for name, phase in bundle.phases.items()}
        self._file = TensorFile(bundle.path(bundle.weights_file))
        self._values: WeakValueDictionary[str, Any] = WeakValueDictionary()

    def of(self, component: str) -> dict[str, Any]:
        """The weights that a graph uses, as OrtValues by name. They live as long as the caller keeps them.

        Raises:
            MissingDependency: the device has no room.
        """
        held = {}
        for name in self._names[component]:
            value = self._values.get(name)
            if value is None:
                value = self._uploaded(name)
                self._values[name] = value
            held[name] = value
        return held

    def end_prefill(self) -> None:
        """Nothing: what only closed sessions used is gone already."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _uploaded(self, name: str) -> Any:
        provider = self.provider
        try:
            return ort.OrtValue.ortvalue_from_numpy(self._file[name], provider.memory, provider.index)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if _NO_ROOM.search(str(error)):
                raise MissingDependency(f"the GPU has no room for the weight {name}", _SMALLER) from error
            raise MoiieError(f"ONNX Runtime cannot place the weight {name}: {error}") from error


_SMALLER = "end other programs on the GPU, or export the bundle with int8 or int4 weights"


class OrtCudaSession(OnnxRuntimeSession):
    """One graph of an engine on a device. A `Session`; see there for the methods.

    Floats are rounded to what the graph takes. Outputs come back to the host unless they are bound.

    Args:
        model: path of the graph, or its bytes.
        component: its name.
        threads: of what ONNX Runtime leaves to the CPU.
        transient: give the memory of intermediate results back after each run.
        folder: where external data lies when `model` is bytes.
        options: of `prepare`.

    Raises:
        MoiieError: ONNX Runtime cannot load the graph.
        MissingDependency: the provider cannot be used here, or there is no room.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        component: str,
        threads: int | None = None,
        transient: bool = False,
        folder: Path | None = None,
        options: EngineOptions = PORTABLE_OPTIONS,
    ) -> None:
        if options.device is None or not isinstance(options.shared, OrtWeights):
            raise MoiieError(
                f"{component}: the backend onnxruntime_cuda runs what `moiie build --target ort-cuda` made",
                "build the bundle, and name the target it was built for",
            )
        self._device: Device = options.device
        self._provider = options.shared.provider
        self._weights = options.shared.of(component)
        self._staged: dict[str, Any] = {}
        self._copied: list[Any] = []
        self._transient = transient
        self._arenas = f"{self._provider.arena}:{self._provider.index}"
        super().__init__(
            model, component=component, threads=threads, transient=transient, folder=folder, options=options
        )

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph once; see `OnnxRuntimeSession.run`. Floats may be of any width."""
        with self._device.lock:
            self._device.activate()
            try:
                return super().run({name: self._rounded(name, array) for name, array in feeds.items()}, outputs)
            finally:
                if self._transient:
                    self._release()

    def unbind(self) -> None:
        """Forget all buffers that were bound, and give back copies of host arrays."""
        super().unbind()
        while self._copied:
            self._copied.pop().free()

    def close(self) -> None:
        """Release the graph, its bindings, and weights that no other session uses. Closing twice is allowed."""
        super().close()
        self._release()
        self._weights = {}

    def _release(self) -> None:
        self._bindings.clear()  # they hold the addresses
        while self._staged:
            self._staged.popitem()[1].free()

    def _opened(self, source: str | bytes, settings: Any) -> Any:
        provider = self._provider
        for name, value in self._weights.items():
            settings.add_initializer(name, value)
        session = ort.InferenceSession(source, settings, providers=[(provider.name, dict(provider.settings))])
        if provider.name not in session.get_providers():  # it falls back to the CPU without an error
            raise MissingDependency(
                f"{self._where}: ONNX Runtime {ort.__version__} cannot use {provider.name}", _LIBRARIES
            )
        return session

    def _rounded(self, name: str, array: Array) -> Array:
        """The array as the graph takes it, if all that differs is the width of its floats."""
        spec = self.inputs.get(name)
        wanted = None if spec is None else np.dtype(spec.dtype)
        if wanted is None or wanted.kind != "f" or array.dtype.kind != "f":
            return array
        with np.errstate(over="ignore"):
            return array.astype(wanted, copy=False)

    def _bindable(self, name: str, spec: TensorSpec, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            if name in self.outputs:
                raise MoiieError(f"{self._where}: output `{name}` can only be bound to a buffer of the device")
            array = self._device.upload(array, f"input {name}", spec.dtype)
            self._copied.append(array)
        if array.dtype != spec.dtype or not spec.admits(array.shape):
            raise MoiieError(f"{self._where}: `{name}` must be {spec}, got {TensorSpec(array.dtype, array.shape)}")
        return array

    def _bind_input(self, binding: Any, name: str, array: Any) -> None:
        if isinstance(array, np.ndarray):
            if array.dtype.kind != "f":  # positions and the like, which ONNX Runtime looks at on the host
                super()._bind_input(binding, name, array)
                return
            array = self._stage(name, array)
        binding.bind_input(
            name, self._provider.memory, self._provider.index, np.dtype(array.dtype).type, array.shape, array.address
        )

    def _bind_output(self, binding: Any, name: str, array: Any) -> None:
        if array is None or isinstance(array, np.ndarray):
            super()._bind_output(binding, name, array)
        else:
            binding.bind_output(
                name,
                self._provider.memory,
                self._provider.index,
                np.dtype(array.dtype).type,
                array.shape,
                array.address,
            )

    def _stage(self, name: str, array: Array) -> Any:
        """A fed array on the device, in the buffer of the run before where it fits."""
        buffer = self._staged.get(name)
        if buffer is None or buffer.shape != array.shape:
            if buffer is not None:
                buffer.free()
            buffer = self._staged[name] = self._device.empty(array.shape, array.dtype.name, f"input {name}")
        buffer.write(array)
        return buffer

    def _failed(self, error: Exception) -> MoiieError:
        if _NO_ROOM.search(str(error)):
            memory = self._device.memory()
            return MissingDependency(
                f"{self._where}: {self._device.name} has no room for intermediate results "
                f"({readable(memory.free)} of {readable(memory.total)} are free)",
                "use a smaller batch or a shorter prompt, end other programs on the GPU, or export with int8 or int4 weights",
            )
        return super()._failed(error)


def check_machine(engine: Engine) -> None:
    """Look whether an engine can run here; no GPU is opened.

    Raises:
        MissingDependency: the package, its libraries, a driver or a GPU is missing, or the package is too old.
    """
    if _CUDA not in ort.get_available_providers():
        raise MissingDependency(f"onnxruntime {ort.__version__} as installed here is for CPUs only", _SWAP)
    check_release(engine.needs, ort.__version__)
    _check_libraries(Path(ort.__file__).parent / "capi")
    find_gpu(engine)


def prepare(engine: Engine) -> EngineOptions:
    """Look whether an engine can run here, and open the GPU.

    Raises:
        MissingDependency: see `check_machine`.
    """
    check_machine(engine)
    device = CudaDevice(engine.gpu)
    settings = {
        "device_id": str(device.index),
        "user_compute_stream": str(device.stream),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",  # float32 means float32
    }
    provider = Provider(_CUDA, "cuda", "gpu", device.index, settings)
    return EngineOptions(
        device=device, shared=OrtWeights(engine.bundle, provider), after_prefill=released_components(engine)
    )


def released_components(engine: Engine) -> tuple[str, ...]:
    """The components whose sessions are closed after the prompt, when the target was built with `after_prefill`."""
    if not engine.releases_after_prefill:
        return ()
    return tuple(name for name in engine.bundle.phases if name != "decoder_decode")


def check_release(needs: Mapping[str, str], installed: str) -> None:
    """Refuse a release of ONNX Runtime whose ops compute something else.

    Raises:
        MissingDependency: it is older than the engine needs.
    """
    wanted = needs.get("onnxruntime")
    if wanted is not None and _release(installed) < _release(wanted):
        raise MissingDependency(
            f"this engine needs ONNX Runtime {wanted} or newer, {installed} is installed: its MoE computes another SwiGLU",
            f'pip install "onnxruntime-gpu>={wanted}" (Python 3.11 or newer), or run the target cpu',
        )


def _release(version: str) -> tuple[int, ...]:
    return version_numbers(version)[:2]


def _check_libraries(folder: Path) -> None:
    """Load the provider as ONNX Runtime would, which says nothing when that fails.

    Raises:
        MissingDependency: a library that it needs is not there; the message names it.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        ort.preload_dlls()  # CUDA and cuDNN of NVIDIA's packages; it prints what it does not find
    for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        path = folder / name
        if not path.is_file():  # not Linux
            continue
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise MissingDependency(f"ONNX Runtime's CUDA provider cannot be loaded: {error}", _LIBRARIES) from error
