"""Kernels that TensorRT for RTX compiled for this GPU, kept beside the engine, so that the next load need not compile them."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import open_regular

_log = logging.getLogger(__name__)
SUFFIX = ".kernels"
LARGEST = 1 << 30


class KernelCache:
    """The cache of one engine. TensorRT itself refuses one of another GPU, driver or version, and one that is damaged.

    Args:
        path: of the engine; the cache lies beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(SUFFIX)
        self._cache: Any = None
        self._known = b""

    def create_context(self, engine: Any, strategy: Any) -> Any:
        """An execution context of an engine, with the cache where the library has such a thing; None when it fails.

        Args:
            engine: TensorRT's engine.
            strategy: of its device memory.
        """
        configure = getattr(engine, "create_runtime_config", None)
        config = None if configure is None else configure()
        if config is None or not hasattr(config, "create_runtime_cache"):
            return engine.create_execution_context(strategy)
        config.set_execution_context_allocation_strategy(strategy)
        self._cache = config.create_runtime_cache()
        stored = self._read()
        if stored and self._cache.deserialize(stored):
            self._known = stored
        elif stored:
            _log.info("%s: is of another GPU, driver or version, or damaged: kernels are compiled again", self._path)
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def save(self) -> None:
        """Write what was compiled meanwhile; a folder that cannot be written to is none of the model's business."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        data = bytes(cache.serialize() or b"")
        if not data or data == self._known:
            return
        written = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            written.write_bytes(data)
            written.replace(self._path)
        except OSError as error:
            _log.info("%s: compiled kernels cannot be kept: %s", self._path, error)
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)

    def _read(self) -> bytes:
        try:
            with open_regular(self._path) as file:
                return file.read(LARGEST)
        except (MoiieError, OSError) as error:  # there is none, or nothing that can be read
            _log.debug("%s: %s", self._path, error)
            return b""
