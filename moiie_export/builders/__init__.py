"""Builders: a bundle becomes BUNDLE/engines/<target>, by the target's backend.

Each backend has a module here with two functions, imported when it is asked for:
    build(request: BuildRequest, progress: Progress) -> BuildResult
    plan(request: BuildRequest) -> BuildPlan      what a build would do and need; writes nothing
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from moiie_export.stages import Progress
from moiie_export.targets import Target
from moiie_runtime.errors import MoiieError

BUILDERS: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("moiie_export.builders.cpu:build_cpu", "moiie_export.builders.cpu:plan_cpu"),
    "onnxruntime_cuda": ("moiie_export.builders.cuda:build_cuda", "moiie_export.builders.cuda:plan_cuda"),
    "tensorrt": ("moiie_export.builders.tensorrt:build_engines", "moiie_export.builders.tensorrt:plan_engines"),
    "tensorrt_rtx": ("moiie_export.builders.tensorrt:build_engines", "moiie_export.builders.tensorrt:plan_engines"),
}
"""backend -> its two functions, as `module:function`."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        bundle: the bundle's directory.
        target: what for.
        force: build again what is up to date.
        memory_limit: bytes that building may take on this machine; None: not limited.
        plugin_library: the shared library of our TensorRT plugins.
        keep_graphs: leave the graphs that went into the engines, with their weights, in engines/<target>/graphs.
        options: of `moiie build`, for whoever builds again: `recipe` as it was given, where the target is of no recipe of
            the bundle's, and `sm` where it was chosen. The plugin library is not among them: a result says that it has one.
    """

    bundle: Path
    target: Target
    force: bool = False
    memory_limit: int | None = None
    plugin_library: Path | None = None
    keep_graphs: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """Where the result lies."""
        return self.bundle / "engines" / self.target.name


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do.

    Attributes:
        cached: whether the result is there already and nothing would be done.
        peak_bytes: memory that building is predicted to take.
        disk_bytes: what would be written.
        commands: equivalent command lines of other tools, for a reader; may be empty.
        notes: anything else worth saying, one line each.
    """

    cached: bool
    peak_bytes: int
    disk_bytes: int
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        path: BUNDLE/engines/<target>.
        cached: whether it was there already.
        seconds: how long it took.
        files: name below `path` -> {"sha256", "bytes"}, without engine.json itself.
        notes: JSON data about it, for `--json`.
    """

    path: Path
    cached: bool
    seconds: float
    files: Mapping[str, Mapping[str, Any]]
    notes: Mapping[str, Any] = field(default_factory=dict)


def build(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build a bundle for a target.

    Raises:
        MissingDependency: a package, a library or memory is missing.
        MoiieError: the bundle or the target cannot be built.
    """
    return cast("BuildResult", _function(request, 0)(request, progress))


def plan(request: BuildRequest) -> BuildPlan:
    """What `build` would do; nothing is written."""
    return cast("BuildPlan", _function(request, 1)(request))


def _function(request: BuildRequest, index: int) -> Any:
    target = request.target
    if target.backend not in BUILDERS:
        raise MoiieError(
            f"target {target.name}: the bundle is run as it is by {target.backend}; there is nothing to build",
            f"moiie run {request.bundle} --target {target.name}",
        )
    module, name = BUILDERS[target.backend][index].split(":")
    return getattr(importlib.import_module(module), name)
