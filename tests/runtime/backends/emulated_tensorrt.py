"""An emulation of TensorRT's Python API over the emulated driver. It proves that the runtime keeps TensorRT's rules, not more.

A plan is JSON: it names a graph of the portable bundle, which ONNX Runtime computes on the memory that was bound, or one
in a dialect of TensorRT, with its precision and its banks, which tests/trt_reference.py computes. What
TensorRT would refuse is refused; what it would silently compute wrongly (experts that are not those of the bundle, a
profile's shape that was not set again) comes out as NaN.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moiie_runtime.backends.device import ITEM_BYTES, on_host, storage, stored
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from tests.runtime.backends.emulated_cuda import ALIGNMENT, EmulatedCuda, Failure
from tests.trt_reference import Dialect

MAGIC = b"emulated plan "
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
}
DataType = enum.Enum("DataType", list(_DTYPES.values()))  # type: ignore[misc]
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
Strategy = enum.Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])


class ILogger:
    """TensorRT's; a runtime derives from it."""

    class Severity(enum.IntEnum):
        """How bad it is."""

        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Severity, message: str) -> None:
        """Hear a message."""


class EmulatedTensorRt:
    """The module.

    Attributes:
        capturable: what `is_stream_capturable` says; None: the library has no such function.
        capture_fails: a recording breaks although that was not foretold.
        libraries: plugin libraries that were loaded.
        jit: whether kernels are compiled when a context first needs them, as TensorRT for RTX does it.
        compiled: how often that was done.
    """

    ILogger = ILogger
    DataType = DataType
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = Strategy
    ComputeCapability = SimpleNamespace(__members__={"SM86": 86, "SM89": 89, "SM120": 120})
    __spec__ = ModuleSpec("tensorrt", None)  # others look whether there is one

    def __init__(self, cuda: EmulatedCuda, version: str) -> None:
        self.cuda = cuda
        self.__version__ = version
        self.capturable: bool | None = None
        self.capture_fails = False
        self.libraries: list[str] = []
        self.jit = False
        self.compiled = 0
        self.chosen: list[int] = []
        self.graph = cache(lambda path: OnnxRuntimeSession(path, component=path.stem, threads=1))

    def get_plugin_registry(self) -> Any:
        """The registry."""
        return SimpleNamespace(load_library=lambda path: self.libraries.append(path) or object())

    def Runtime(self, logger: ILogger) -> EmulatedRuntime:  # noqa: N802 - TensorRT's name
        """A runtime."""
        return EmulatedRuntime(self, logger)


class EmulatedRuntime:
    """TensorRT's Runtime."""

    def __init__(self, trt: EmulatedTensorRt, logger: ILogger) -> None:
        self.trt, self.logger = trt, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: Any) -> EmulatedEngine | None:
        """The engine; its weights take memory of the device."""
        data = bytes(plan)
        if not data.startswith(MAGIC):
            self.logger.log(ILogger.Severity.ERROR, "magicTag mismatch")
            return None
        try:
            return EmulatedEngine(self, json.loads(data[len(MAGIC) :]))
        except Failure as failure:
            reason = f"Cuda failure: {failure}"
            self.logger.log(ILogger.Severity.ERROR, reason)
            return None


class EmulatedEngine:
    """TensorRT's ICudaEngine. `plan`: see `write_plan`."""

    def __init__(self, runtime: EmulatedRuntime, plan: Mapping[str, Any]) -> None:
        self.runtime, self.plan = runtime, plan
        self.tensors = {each["name"]: each for each in [*plan["inputs"], *plan["outputs"]]}
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = plan["workspace"]
        self._cuda = runtime.trt.cuda
        self._weights = self._cuda.take(plan["constants"])
        self.dialect = Dialect(Path(plan["graph"])) if plan.get("dialect") else None

    def __del__(self) -> None:
        if hasattr(self, "_weights"):
            self._cuda.give(self._weights)

    def get_tensor_name(self, index: int) -> str:
        """Name of a tensor."""
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        """Type of a tensor."""
        return DataType[_DTYPES[self.tensors[name]["dtype"]]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape with -1 for what is open."""
        return tuple(-1 if isinstance(size, str) else size for size in self.tensors[name]["shape"])

    def get_tensor_location(self, name: str) -> Any:
        """Where a tensor must lie."""
        return TensorLocation.HOST if name in self.plan["host"] else TensorLocation.DEVICE

    def create_execution_context(self, given: Any) -> EmulatedContext:
        """A context; `given` is a strategy or a configuration."""
        config = given if isinstance(given, RuntimeConfig) else None
        assert (given if config is None else config.strategy) is Strategy.USER_MANAGED
        return EmulatedContext(self, None if config is None else config.cache)

    def __getattr__(self, name: str) -> Any:
        if name == "create_runtime_config" and self.runtime.trt.jit:
            return RuntimeConfig
        raise AttributeError(name)


class RuntimeConfig:
    """IRuntimeConfig of TensorRT for RTX."""

    strategy: Any = None
    cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Who gives memory."""
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        """A new one."""
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        """The cache that contexts of this configuration use."""
        self.cache = cache
        return True


class RuntimeCache:
    """IRuntimeCache: the profiles of which kernels were compiled."""

    def __init__(self) -> None:
        self.kernels: list[int] = []

    def deserialize(self, blob: bytes) -> bool:
        """Whether it was taken."""
        if not blob.startswith(MAGIC):
            return False
        self.kernels = json.loads(blob[len(MAGIC) :])
        return True

    def serialize(self) -> bytes:
        """As bytes."""
        return MAGIC + json.dumps(self.kernels).encode()


class EmulatedContext:
    """TensorRT's IExecutionContext."""

    def __init__(self, engine: EmulatedEngine, cache: RuntimeCache | None = None) -> None:
        self.engine = engine
        self._cache = cache
        self._trt = engine.runtime.trt
        self._cuda = self._trt.cuda
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._settled = False  # whether a run was made since something changed

    def is_stream_capturable(self, stream: int) -> bool:
        """Whether a recording is possible."""
        return self._trt.capturable is not False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        """Choose a profile, which forgets shapes."""
        self._settled = False
        self._profile = index
        self._shapes, self._addresses = {}, {}
        return 0 <= index < len(self.engine.plan["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set the shape of an input with open dimensions, within the profile."""
        self._settled = False
        sizes = self.engine.plan["profiles"][self._profile]["sizes"]
        for label, size in zip(self.engine.tensors[name]["shape"], shape, strict=True):
            low, _, high = sizes[label] if isinstance(label, str) else (label, label, label)
            if not low <= size <= high:
                return self._refuse(f"{name}: {size} is not within [{low}, {high}] of profile {self._profile}")
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; -1 for what is not known yet."""
        known: dict[str, int] = {"batch": self.engine.plan["batch"]}
        for each, shape in self._shapes.items():
            labels = self.engine.tensors[each]["shape"]
            known |= {label: size for label, size in zip(labels, shape, strict=True) if isinstance(label, str)}
        shape = self.engine.tensors[name]["shape"]
        return tuple(_size(size, known) if isinstance(size, str) else size for size in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Tie a tensor to memory."""
        self._settled = False
        if address % ALIGNMENT and name not in self.engine.plan["host"]:
            return self._refuse(f"{name}: its address is not a multiple of {ALIGNMENT}")
        self._addresses[name] = address
        return address != 0

    def set_device_memory(self, address: int, size: int) -> None:
        """Give it room for intermediate results."""
        self._settled = False
        self._memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        """Put a run on the stream."""
        reason = self._not_ready()
        if reason is None and self._cuda.recording(stream) and (not self._settled or self._trt.capture_fails):
            self._cuda.spoil(stream)
            reason = "operation not permitted when stream is capturing"
        if reason is not None:
            return self._refuse(reason)
        self._settled = True
        if self._trt.jit and (self._cache is None or self._profile not in self._cache.kernels):
            self._trt.compiled += 1
            if self._cache is not None:
                self._cache.kernels.append(self._profile)
        addresses, memory = dict(self._addresses), self._memory
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.tensors}
        self._trt.chosen.append(self._profile)
        self._cuda.put(stream, lambda: self._compute(addresses, shapes, memory))
        return True

    def _refuse(self, message: str) -> bool:
        self.engine.runtime.logger.log(ILogger.Severity.ERROR, message)
        return False

    def _not_ready(self) -> str | None:
        plan = self.engine.plan
        for name in self.engine.tensors:
            if name not in self._addresses:
                return f"{name}: no address was set"
            if -1 in self.get_tensor_shape(name):
                return f"{name}: its shape is not set"
        for name in (each["name"] for each in plan["outputs"]):
            source = plan["aliases"].get(name)
            others = {self._addresses[each["name"]] for each in plan["inputs"]}
            if source is not None and self._addresses[name] != self._addresses[source]:
                return f"{name}: must lie where {source} lies"
            if source is None and self._addresses[name] in others:
                return f"{name}: would overwrite an input"
        if self._memory[1] < plan["workspace"] or self._memory[0] % ALIGNMENT:
            return "no device memory was set"
        return None

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], memory: tuple[int, int]) -> None:
        cuda = self._cuda
        cuda.view(*memory).fill(0xAB)  # intermediate results of another graph, or of nobody
        arrays = {}
        for name, spec in self.engine.tensors.items():
            size = math.prod(shapes[name]) * ITEM_BYTES[spec["dtype"]]
            raw = cuda.view(addresses[name], size, locked=name in self.engine.plan["host"])
            arrays[name] = raw.view(storage(spec["dtype"])).reshape(shapes[name])
        if self.engine.dialect is not None:
            self._compute_dialect(self.engine.dialect, arrays)
        else:
            self._compute_portable(self._trt.graph(Path(self.engine.plan["graph"])), arrays, shapes)

    def _compute_dialect(self, graph: Dialect, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        """Every input as it lies in memory."""
        found = graph.run({name: arrays[name].copy() for name in graph.inputs})
        for each in self.engine.plan["outputs"]:
            arrays[each["name"]][...] = found[each["name"]]

    def _compute_portable(
        self, graph: OnnxRuntimeSession, arrays: dict[str, np.ndarray[Any, Any]], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """float32, rounded at the ends; experts that are not those of the bundle give NaN."""
        plan = self.engine.plan
        feeds = {}
        for name, spec in graph.inputs.items():
            if name not in arrays:  # the builder drops inputs that no node reads
                feeds[name] = np.zeros(shapes["inputs_embeds"][:2], spec.dtype)
                continue
            numbers = on_host(arrays[name], self.engine.tensors[name]["dtype"])
            feeds[name] = numbers.astype(spec.dtype)
        found = graph.run(feeds)
        sound = all(arrays[name].tobytes() == Path(path).read_bytes() for name, path in plan["banks"].items())
        for each in plan["outputs"]:
            name, target = each["name"], arrays[each["name"]]
            numbers = found[name] if sound or target.dtype.kind != "f" else np.full_like(found[name], np.nan)
            target[:] = stored(numbers, each["dtype"]).reshape(target.shape)


def _size(label: str, known: Mapping[str, int]) -> int:
    """A name such as `sequence`, or `4*sequence`."""
    factors = [int(part) if part.isdigit() else known.get(part, -1) for part in label.split("*")]
    return -1 if -1 in factors else math.prod(factors)


def write_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Write a plan.

    graph and whether it is one in a dialect, inputs, outputs, profiles, aliases, banks (input -> file of its bytes),
    host, workspace, constants.
    """
    path.write_bytes(MAGIC + json.dumps(plan).encode())
