"""TensorRT for builders: the same import as the runtime's."""

from __future__ import annotations

from moiie_runtime.backends.tensorrt_library import Library, installed_version, load_library, load_plugins

__all__ = ["Library", "installed_version", "load_library", "load_plugins"]
