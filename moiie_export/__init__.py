"""The workstation side: checkpoint -> bundle, and the proof that the bundle is the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up on first use: the look-up takes a third of the time of `moiie --help`."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moiie-export")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
