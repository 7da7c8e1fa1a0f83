"""The workstation side: checkpoint -> bundle, and the proof that the bundle is the model."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moiie-export")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
