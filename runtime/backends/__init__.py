"""Backends by name. Each is imported only when a bundle is loaded with it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions, Session
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import quote

if TYPE_CHECKING:
    from moiie_runtime.engines import Engine

ENTRY_POINT_GROUP = "moiie.backends"
_BUILT_IN = {"onnxruntime": "moiie_runtime.backends.onnxruntime:OnnxRuntimeSession"}
_ENGINES = {
    "onnxruntime_cuda": "moiie_runtime.backends.onnxruntime_cuda:OrtCudaSession",
    "tensorrt": "moiie_runtime.backends.tensorrt:TensorRtSession",
    "tensorrt_rtx": "moiie_runtime.backends.tensorrt:TensorRtSession",
}
"""Backends that run what `moiie build` made, and not a bundle's own graphs."""
_PREPARE = {
    "onnxruntime_cuda": "moiie_runtime.backends.onnxruntime_cuda:prepare",
    "tensorrt": "moiie_runtime.backends.tensorrt:prepare",
    "tensorrt_rtx": "moiie_runtime.backends.tensorrt:prepare",
}
"""Backend -> what looks whether an engine can run here, opens its device, and gives the options of its sessions."""
_CHECK = {
    "onnxruntime_cuda": "moiie_runtime.backends.onnxruntime_cuda:check_machine",
    "tensorrt": "moiie_runtime.backends.tensorrt_checks:check_machine",
    "tensorrt_rtx": "moiie_runtime.backends.tensorrt_checks:check_machine",
}
"""Backend -> the part of that which only looks."""


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
    """What can run a bundle's own graphs: the built-in backends and those that installed packages add."""
    return sorted({*_BUILT_IN, *_added()})


def get_backend(name: str) -> OpenSession:
    """The function that opens sessions of the backend called `name`.

    Raises:
        MoiieError: no backend has this name, or what is registered under it is not callable.
        MissingDependency: the backend's own packages are not installed.
    """
    known = {**_BUILT_IN, **_ENGINES}
    check_known(name)
    opener = _attribute(known[name]) if name in known else _added()[name].load()
    if not callable(opener):
        raise MoiieError(f"backend {name!r} is registered with something that cannot open a session: {opener!r}")
    return cast(OpenSession, opener)


def check_known(name: str, where: str = "", hint: str = "") -> None:
    """Refuse a name that no backend has: neither one that runs bundles, nor one that runs built forms.

    Args:
        name: the backend's.
        where: what the message begins with.
        hint: what to do; else the names that there are.

    Raises:
        MoiieError: naming it.
    """
    if name not in _BUILT_IN and name not in _ENGINES and name not in _added():
        names = f"the known ones are {', '.join(backend_names())}; and for built forms {', '.join(_ENGINES)}"
        raise MoiieError(f"{where}no backend is called {quote(name)}", hint or names)


def needs_device(name: str) -> bool:
    """Whether a backend runs on a device of its own, a GPU."""
    return name in _PREPARE


def check_machine(engine: Engine) -> None:
    """Look whether this machine can run a built form; no device is opened.

    Raises:
        MissingDependency: what is missing first, and what to do about it.
    """
    place = _CHECK.get(engine.backend)
    if place is not None:
        _attribute(place)(engine)


def prepare(engine: Engine) -> EngineOptions | None:
    """Everything that can be refused before a built form's first graph is opened is refused here.

    Returns:
        The options of all its sessions, which the caller closes; None where the backend needs no preparation.

    Raises:
        MissingDependency: this machine lacks something.
        MoiieError: the engine is damaged.
    """
    place = _PREPARE.get(engine.backend)
    return None if place is None else cast(EngineOptions, _attribute(place)(engine))


def _attribute(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def _added() -> dict[str, EntryPoint]:
    """Entry points of other packages; none may take the place of a built-in name or of another package's."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in _BUILT_IN or entry.name in _ENGINES or entry.name in found:
            raise MoiieError(
                f"two installed packages register a backend called {entry.name!r} ({entry.value})",
                "uninstall one of them",
            )
        found[entry.name] = entry
    return found
