"""Expert weights of a TensorRT engine on the device: uploaded once, bound by address, released when no phase needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_runtime.backends.device import BFLOAT16, FLOAT8, Device, DeviceBuffer
from moiie_runtime.tensors import TensorFile

DECODE = "decoder_decode"


@dataclass(frozen=True)
class Bank:
    """Experts of one layer that come and go together.

    Attributes:
        inputs: engine inputs that they are bound to, named like tensors of the file.
        components: the engines that have these inputs.
    """

    inputs: tuple[str, ...]
    components: tuple[str, ...]


class ExpertBanks:
    """The banks of a built form of a bundle.

    Args:
        path: banks.safetensors.
        document: `banks` of engine.json.
        device: where they go.
    """

    def __init__(self, path: Path, document: Sequence[Mapping[str, Any]], device: Device) -> None:
        self._banks = [Bank(tuple(each["inputs"]), tuple(each["components"])) for each in document]
        self._path = path
        self._device = device
        self._buffers: dict[str, DeviceBuffer] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are on the device now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def names(self, component: str) -> list[str]:
        """The inputs of an engine that are banks."""
        return [name for bank in self._banks if component in bank.components for name in bank.inputs]

    def buffers(self, component: str) -> dict[str, DeviceBuffer]:
        """What an engine's banks are bound to; those that are not on the device are uploaded.

        Raises:
            MissingDependency: no room on the device.
            MoiieError: the file is damaged.
        """
        names = self.names(component)
        missing = [name for name in names if name not in self._buffers]
        if missing:
            with TensorFile(self._path) as file:  # its pages are the system's to take back
                for name in missing:
                    self._buffers[name] = self._upload(file, name)
        return {name: self._buffers[name] for name in names}

    def release_prefill(self) -> None:
        """Free what a decode step does not use."""
        kept = set(self.names(DECODE))
        for name in [name for name in self._buffers if name not in kept]:
            self._buffers.pop(name).free()

    def close(self) -> None:
        """Free everything."""
        while self._buffers:
            self._buffers.popitem()[1].free()

    def _upload(self, file: TensorFile, name: str) -> DeviceBuffer:
        what = f"the experts {name}"
        info = file.header.get(name)
        if info is not None and info.dtype == "F8_E4M3":
            return self._device.upload(file.bits(name), what, FLOAT8)
        if info is None or info.dtype != "BF16":
            return self._device.upload(file[name], what)
        buffer = self._device.empty(info.shape, BFLOAT16, what)
        for row in range(info.shape[0]):  # as float32 on the host: one expert at a time
            buffer.rows(row, row + 1).write(file.rows(name, row, row + 1))
        return buffer
