"""What all engines of one loaded bundle share: TensorRT's runtime, the device, expert banks, and room to work in."""

from __future__ import annotations

import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moiie_runtime.backends.device import Device, DeviceBuffer
from moiie_runtime.backends.expert_banks import ExpertBanks
from moiie_runtime.backends.tensorrt_library import Library, load_plugins
from moiie_runtime.backends.tensorrt_log import Said, listener
from moiie_runtime.errors import MissingDependency, MoiieError, Unsound
from moiie_runtime.sizes import readable
from moiie_runtime.strict_files import open_regular, sha256_file

if TYPE_CHECKING:
    from moiie_runtime.engines import Engine

_log = logging.getLogger(__name__)


class TensorRtShared:
    """Made once for all sessions of an engine. A `Shared`; see there for the methods.

    Graphs of one bundle never run at the same time, so one piece of memory for intermediate results, as large as the
    largest of them needs, serves all.

    Args:
        engine: the built form.
        library: TensorRT.
        device: where it runs.

    Attributes:
        engine: the built form.
        device: where it runs.
        trt: TensorRT's module.
        banks: the experts.
    """

    def __init__(self, engine: Engine, library: Library, device: Device) -> None:
        self.engine = engine
        self.device = device
        self.trt = library.trt
        self.banks = ExpertBanks(
            engine.bundle.path(engine.bundle.weights_file), engine.document.get("banks") or (), device
        )
        self._workspace: DeviceBuffer | None = None
        self._sound: set[str] = set()
        self._releases = bool(after_prefill(engine))
        self._listener = listener(self.trt)
        self._said: Said = self._listener.said
        plugins = engine.document.get("plugins") or {}
        if plugins.get("file") is not None:
            load_plugins(library, engine.bundle.path(f"{engine.folder}/{plugins['file']}"))
        device.activate()
        self._runtime = self.trt.Runtime(self._listener)
        if self._runtime is None:
            raise self.refusal("TensorRT cannot start")
        if plugins.get("embedded"):
            self._runtime.engine_host_code_allowed = True

    def load(self, component: str, path: Path) -> Any:
        """An engine file as TensorRT's engine.

        Raises:
            Unsound: the file is not the one that was built.
            MissingDependency: TensorRT cannot load it here; says why, and how much memory the GPU has.
        """
        if component not in self._sound:  # one that comes and goes is read through once
            self._check(component, path)
        return self.deserialize(path)

    def deserialize(self, path: Path) -> Any:
        """As `load`, of a file that nothing describes.

        Raises:
            MissingDependency: see `load`.
        """
        self._said.clear()
        self.device.activate()
        with open_regular(path) as file:  # mapped, so that it is not in memory twice
            plan = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.refusal(f"{path}: TensorRT cannot load the engine")
        _log.debug("loaded %s", path)
        return engine

    def refusal(self, what: str) -> MissingDependency:
        """An error with what TensorRT said first, and the device's memory, which is most often the reason."""
        memory = self.device.memory()
        room = f"{readable(memory.free)} of {readable(memory.total)} are free on {self.device.name}"
        hint = "see that there is room on the GPU; `moiie doctor` says what is here"
        return MissingDependency(f"{what}: {self._said.reason()} ({room})", hint)

    def failure(self, what: str) -> MoiieError:
        """An error with what TensorRT said first; the device is not asked, which may be recording."""
        return self._said.refusal(what, "run again with -v for all that TensorRT said")

    def forget(self) -> None:
        """Drop what TensorRT said, before something is tried."""
        self._said.clear()

    def workspace(self, size: int) -> int:
        """Address of memory for intermediate results of at least `size` bytes; it may change when a graph needs more.

        Raises:
            MissingDependency: no room.
        """
        if self._workspace is None or self._workspace.nbytes < size:
            if self._workspace is not None:
                self._workspace.free()
                self._workspace = None
            self._workspace = self.device.empty((max(1, size),), "uint8", "intermediate results")
        return self._workspace.address

    def end_prefill(self) -> None:
        """See `Shared`."""
        if not self._releases:
            return
        self.banks.release_prefill()
        if self._workspace is not None:  # prefill needs the most by far
            self._workspace.free()
            self._workspace = None

    def close(self) -> None:
        """See `Shared`."""
        self.banks.close()
        if self._workspace is not None:
            self._workspace.free()
            self._workspace = None
        self._runtime = None

    def _check(self, component: str, path: Path) -> None:
        record = self.engine.bundle.files[self.engine.bundle.components[component].file]
        digest = sha256_file(path)
        if digest != record.sha256:
            raise Unsound(
                f"{path}: the engine is damaged: sha256 is {digest}, engine.json says {record.sha256}",
                f"build it again: {self.engine.build} --force",
            )
        self._sound.add(component)


def after_prefill(engine: Engine) -> tuple[str, ...]:
    """Components whose engines leave the device when the prompt was run; none where the target keeps them."""
    if not engine.releases_after_prefill:
        return ()
    return tuple(encoder.component for encoder in engine.bundle.encoders)
