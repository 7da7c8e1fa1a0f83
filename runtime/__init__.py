"""Runs exported vision-language models: pictures and text in, text out, without PyTorch.

Example:
    import moiie_runtime as mr

    with mr.load("moiie.bundle") as vlm:
        for chunk in vlm.stream([{"role": "user", "content": [Path("cat.png"), "What is this?"]}]):
            print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.errors import MissingDependency, MoiieError, Unsound
    from moiie_runtime.generate import Chunk, Generation, Record, Stats
    from moiie_runtime.generation_config import GenerationConfig
    from moiie_runtime.instance_routing import Instance
    from moiie_runtime.memory import MemoryEstimate
    from moiie_runtime.processor import Processor
    from moiie_runtime.prompt import Prompt
    from moiie_runtime.routing import Routing, RoutingStats
    from moiie_runtime.vlm import VLM, load

    __version__: str

__all__ = [
    "VLM",
    "Bundle",
    "Chunk",
    "Generation",
    "GenerationConfig",
    "Instance",
    "MemoryEstimate",
    "MissingDependency",
    "MoiieError",
    "Processor",
    "Prompt",
    "Record",
    "Routing",
    "RoutingStats",
    "Stats",
    "Unsound",
    "__version__",
    "load",
]

# Imported on first use: the command line reads `moiie_runtime.errors` for `moiie --help`, without numpy and the rest.
_HOMES = {
    "Bundle": "bundle",
    "Chunk": "generate",
    "Generation": "generate",
    "GenerationConfig": "generation_config",
    "Instance": "instance_routing",
    "MemoryEstimate": "memory",
    "MissingDependency": "errors",
    "MoiieError": "errors",
    "Processor": "processor",
    "Prompt": "prompt",
    "Record": "generate",
    "Routing": "routing",
    "RoutingStats": "routing",
    "Stats": "generate",
    "Unsound": "errors",
    "VLM": "vlm",
    "load": "vlm",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moiie-export")
    except PackageNotFoundError:  # used from a source tree that is not installed
        return "0+unknown"
