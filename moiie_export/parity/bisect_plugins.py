"""The plugin library that an engine was built with: a graph that is built again needs it.

Most engines hold the library themselves; TensorRT does not give it back, so it must be there as a file, too.
"""

from __future__ import annotations

from pathlib import Path

from moiie_runtime.engines import Engine
from moiie_runtime.errors import MissingDependency
from moiie_runtime.strict_files import sha256_file


def holds_plugins(engine: Engine) -> bool:
    """Whether the library is stored in the engines, and nowhere else."""
    plugins = engine.document.get("plugins") or {}
    return bool(plugins) and plugins.get("file") is None


def plugin_library(engine: Engine, candidate: Path | None) -> Path | None:
    """The library's file; None where the engine has no node for it.

    Args:
        engine: the built form.
        candidate: where the library should lie, if the engines hold it.

    Raises:
        MissingDependency: it is not there, or another one is.
    """
    plugins = engine.document.get("plugins")
    if not plugins:
        return None
    if not holds_plugins(engine):
        return engine.bundle.path(f"{engine.folder}/{plugins['file']}")
    wanted, found = plugins["sha256"], "no file is named"
    if candidate is not None:
        digest = sha256_file(candidate) if candidate.is_file() else None
        if digest == wanted:
            return candidate
        found = f"there is no {candidate}" if digest is None else f"{candidate} has {digest[:12]}..."
    root, target = engine.bundle.root, engine.target
    raise MissingDependency(
        f"{root}: the graphs of engine {target} are built again with the plugin library that it holds (sha256 "
        f"{wanted[:12]}...), and that is needed as a file: {found}",
        f"moiie parity {root} --bisect --target {target} --plugins LIBRARY; if it is lost: moiie plugins build --sm "
        f"{_sms(engine)}, then {engine.build} --force",
    )


def _sms(engine: Engine) -> str:
    kernels = engine.document["plugins"].get("kernels") or {}
    return ",".join(str(sm) for sm in sorted(kernels.get("sms") or engine.document["sms"]))
