"""Backends by name. Each is imported only when a bundle is loaded with it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol, cast

from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions, Session
from moiie_runtime.errors import MoiieError

ENTRY_POINT_GROUP = "moiie.backends"
_BUILT_IN = {"onnxruntime": "moiie_runtime.backends.onnxruntime:OnnxRuntimeSession"}


class OpenSession(Protocol):
    """What a backend's entry names: it opens one graph file."""

    def __call__(
        self,
        model: Path,
        *,
        component: str,
        threads: int | None,
        transient: bool,
        options: EngineOptions = PORTABLE_OPTIONS,
    ) -> Session:
        """Open the graph of `component`.

        Args:
            model: the graph's file.
            component: its name, for messages.
            threads: None for one for each available core.
            transient: give the memory of intermediate results back after each run.
            options: what a built form of the bundle asks for.
        """


def backend_names() -> list[str]:
    """The names that `get_backend` knows: the built-in ones and those that installed packages add."""
    return sorted({*_BUILT_IN, *_added()})


def get_backend(name: str) -> OpenSession:
    """The function that opens sessions of the backend called `name`.

    Raises:
        MoiieError: no backend has this name, or what is registered under it is not callable.
        MissingDependency: the backend's own packages are not installed.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        opener = getattr(import_module(module), attribute)
    else:
        entry = _added().get(name)
        if entry is None:
            raise MoiieError(f"no backend is called {name!r}", f"the known ones are {', '.join(backend_names())}")
        opener = entry.load()
    if not callable(opener):
        raise MoiieError(f"backend {name!r} is registered with something that cannot open a session: {opener!r}")
    return cast(OpenSession, opener)


def _added() -> dict[str, EntryPoint]:
    """Entry points of other packages; none may take the place of a built-in name or of another package's."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in _BUILT_IN or entry.name in found:
            raise MoiieError(
                f"two installed packages register a backend called {entry.name!r} ({entry.value})",
                "uninstall one of them",
            )
        found[entry.name] = entry
    return found
