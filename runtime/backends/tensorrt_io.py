"""Inputs and outputs of an engine: what engine.json says of them, and the buffers of those that the runtime itself owns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moiie_runtime.backends.cuda import CudaBuffer, CudaDevice, PageLocked
from moiie_runtime.backends.cuda_driver import call
from moiie_runtime.backends.device import BFLOAT16, FLOAT8, ITEM_BYTES, Array, on_host, storage, stored
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.errors import MoiieError, Unsound

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": BFLOAT16,
    "FP8": FLOAT8,
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's names of element types."""


@dataclass(frozen=True)
class Profile:
    """Sizes that an engine was built for.

    Attributes:
        name: for messages.
        sizes: name of a dimension -> its smallest and largest size.
    """

    name: str
    sizes: Mapping[str, tuple[int, int]]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether all these sizes are within it."""
        return all(low <= sizes.get(name, low) <= high for name, (low, high) in self.sizes.items())


def read_profiles(component: Mapping[str, Any]) -> list[Profile]:
    """The profiles of a component of engine.json, in the engine's order."""
    return [
        Profile(each["name"], {name: (size[0], size[2]) for name, size in each["sizes"].items()})
        for each in component.get("profiles") or ()
    ]


def choose_profile(where: str, profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Index of the smallest profile that holds these sizes.

    Raises:
        MoiieError: none does; says what they hold.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.holds(sizes)]
    if not fitting:
        wanted = ", ".join(f"{name} {size}" for name, size in sizes.items())
        held = "; ".join(
            f"{each.name}: {', '.join(f'{name} {low} to {high}' for name, (low, high) in each.sizes.items())}"
            for each in profiles
        )
        raise MoiieError(
            f"{where}: the engine was built for no such size: {wanted} (it has {held})",
            "build it again with other profiles: `prefill` and `images` of the target",
        )
    return min(fitting, key=lambda index: math.prod(high for _, high in profiles[index].sizes.values()))


def host_spec(spec: TensorSpec) -> TensorSpec:
    """What a session takes and gives for a tensor of an engine: float32 for half precision."""
    return TensorSpec("float32" if spec.dtype in ("float16", BFLOAT16) else spec.dtype, spec.shape)


def tensor_specs(engine: Any) -> dict[str, TensorSpec]:
    """What an engine says of its inputs and outputs; -1 for an open size."""
    found = {}
    for name in [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]:
        dtype = engine.get_tensor_dtype(name)
        found[name] = TensorSpec(_DTYPES.get(dtype.name, dtype.name), tuple(engine.get_tensor_shape(name)))
    return found


def check_tensors(trt: Any, engine: Any, where: str, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Compare an engine's inputs and outputs with what engine.json says.

    Args:
        trt: TensorRT's module.
        engine: the engine.
        where: for the message.
        specs: of all inputs and outputs.

    Returns:
        Names of those that TensorRT wants in host memory.

    Raises:
        Unsound: they differ.
    """
    found = tensor_specs(engine)
    for name in [*specs, *found]:
        if name not in specs or name not in found or not _alike(specs[name], found[name]):
            raise Unsound(
                f"{where}: the engine has {name} {found.get(name)}, engine.json says {specs.get(name)}",
                "build it again with `moiie build --force`",
            )
    return {name for name in found if engine.get_tensor_location(name) == trt.TensorLocation.HOST}


def _alike(wanted: TensorSpec, found: TensorSpec) -> bool:
    """Whether type and rank are the same, and every size that both know."""
    pairs = zip(wanted.shape, found.shape, strict=False)
    sizes = all(isinstance(size, str) or here in (size, -1) for size, here in pairs)
    return wanted.dtype == found.dtype and len(wanted.shape) == len(found.shape) and sizes


class Port:
    """An input or output that the runtime feeds or reads: page-locked host memory and, on the device, as much again.

    Args:
        device: where the engine runs.
        name: of the tensor, for messages.
        dtype: of the engine's tensor.
        host: TensorRT reads or writes the host memory itself.
    """

    def __init__(self, device: CudaDevice, name: str, dtype: str, host: bool) -> None:
        self._device, self._name, self._dtype, self._host = device, name, dtype, host
        self._locked: PageLocked | None = None
        self._buffer: CudaBuffer | None = None

    @property
    def address(self) -> int:
        """What the engine is given; 0 before the first `fit`."""
        if self._host:
            return 0 if self._locked is None else self._locked.address
        return 0 if self._buffer is None else self._buffer.address

    def fit(self, shape: tuple[int, ...]) -> None:
        """Make room for a tensor of this shape; the address changes when there was less before."""
        size = math.prod(shape) * ITEM_BYTES[self._dtype]
        if self._locked is not None and len(self._locked.bytes) >= max(1, size):
            return
        self.close()
        self._locked = self._device.page_locked(size)
        if not self._host:
            self._buffer = self._device.empty((size,), "uint8", f"the tensor {self._name}")

    def send(self, array: Array) -> None:
        """Put an array's numbers in, in the engine's type. Nothing may still be read from the host memory."""
        self.fit(array.shape)
        assert self._locked is not None
        raw = stored(array, self._dtype).reshape(-1).view(np.uint8)
        self._locked.bytes[: len(raw)] = raw
        if self._buffer is not None:
            call("cuMemcpyHtoDAsync", self._buffer.address, self._locked.address, len(raw), self._device.stream)

    def fetch(self, shape: tuple[int, ...]) -> None:
        """Ask for the numbers; `take` has them when the stream has been waited for."""
        if self._buffer is not None:
            assert self._locked is not None
            size = math.prod(shape) * ITEM_BYTES[self._dtype]
            call("cuMemcpyDtoHAsync", self._locked.address, self._buffer.address, size, self._device.stream)

    def take(self, shape: tuple[int, ...]) -> Array:
        """A new array with the numbers that were fetched, half precision as float32."""
        assert self._locked is not None
        size = math.prod(shape) * ITEM_BYTES[self._dtype]
        raw = self._locked.bytes[:size].view(storage(self._dtype)).reshape(shape)
        numbers = on_host(raw, self._dtype)
        return numbers.astype(np.float32) if self._dtype == "float16" else numbers.copy()

    def close(self) -> None:
        """Give the memory back."""
        for each in (self._buffer, self._locked):
            if each is not None:
                each.free()
        self._buffer, self._locked = None, None
