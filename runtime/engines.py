"""Built forms of a bundle, BUNDLE/engines/<target>, that `moiie build` wrote: found, checked, put in its place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moiie_runtime.backends import check_known, check_machine, needs_device, prepare
from moiie_runtime.backends.session import EngineOptions
from moiie_runtime.build_command import LIBRARY, build_command
from moiie_runtime.bundle import MAX_MANIFEST_BYTES, Bundle
from moiie_runtime.engine_sections import check_sections
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.fields import Fields
from moiie_runtime.manifest import KvSettings, read_components, read_files, read_residency
from moiie_runtime.strict_files import read_json_object

ENGINES, DOCUMENT = "engines", "engine.json"
SCHEMA = 1
PORTABLE = "portable"
"""The name under which the bundle's own graphs are asked for."""
DEFAULT_TARGET = "cpu"
"""Runs where nothing else is asked for and the bundle was built for it."""
KERNELS = "moiie.cpu"
"""Domain of our own CPU kernels; in `needs` with the version of their weights' layout."""


@dataclass(frozen=True)
class Engine:
    """A built form of a bundle.

    Attributes:
        target: its name.
        backend: what runs it; see `moiie_runtime.backends`.
        bundle: the bundle with this engine's graphs, weights and buffers in place of its own.
        needs: what must be there to run it, name -> version, as its builder recorded it.
        threads: how many were asked for when it was built; None: one for each core.
        prepack: see `EngineOptions`.
        document: engine.json as its builder wrote it, for what only its backend reads.
        portable: the bundle as it was exported.
        gpu: which of the GPUs that the process sees runs it; of no meaning where none does.
    """

    target: str
    backend: str
    bundle: Bundle
    needs: Mapping[str, str]
    threads: int | None
    prepack: bool
    portable: Bundle
    document: Mapping[str, Any] = field(default_factory=dict)
    gpu: int = 0

    @property
    def folder(self) -> str:
        """Where its files lie, below the bundle's directory."""
        return f"{ENGINES}/{self.target}"

    @property
    def build(self) -> str:
        """The command that makes it again."""
        return self.rebuild()

    def rebuild(self, sm: Sequence[int] | None = None, plugins: str = LIBRARY) -> str:
        """The same for other GPUs or with another plugin library; see `build_command`."""
        return build_command(self.bundle.root, self.target, self.document, sm=sm, plugins=plugins)

    @property
    def releases_after_prefill(self) -> bool:
        """Whether the target asks that what only the prompt needs leaves the device before the answer."""
        return (self.document.get("settings") or {}).get("residency") == "after_prefill"

    def on(self, gpu: int) -> Engine:
        """The same on this GPU. Whether there is one is found out when it is opened.

        Raises:
            MoiieError: not a number of a GPU, or it runs on none.
        """
        if isinstance(gpu, bool) or not isinstance(gpu, int) or gpu < 0:
            raise MoiieError(f"gpu must be an integer of at least 0, got {gpu!r}")
        if not needs_device(self.backend):
            raise MoiieError(f"gpu: target {self.target} was not built for a GPU", "name the target of one that was")
        return replace(self, gpu=gpu)

    def options(self) -> EngineOptions:
        """What its sessions need, made once for all of them; the caller closes it.

        Our kernels are compiled now if this machine has not done so before; a device is opened.

        Raises:
            MissingDependency: this machine lacks something, or the engine needs another version of it.
            MoiieError: the engine is damaged.
        """
        prepared = prepare(self)
        if prepared is not None:
            return replace(prepared, engine=self)
        if KERNELS not in self.needs:
            return EngineOptions((), self.prepack, engine=self)
        from moiie_runtime import native

        self._check_layout()
        return EngineOptions((native.library(),), self.prepack, engine=self)

    def check(self) -> None:
        """Look whether this machine can run it; nothing is compiled and no device opened.

        Raises:
            MissingDependency: what is missing first, and what to do about it.
        """
        check_machine(self)
        self._check_layout()

    def _check_layout(self) -> None:
        from moiie_runtime import native

        wanted = self.needs.get(KERNELS)
        if wanted is not None and wanted != str(native.LAYOUT):
            raise MissingDependency(
                f"{self.bundle.root}: engine {self.target} has weights in layout {wanted} of our kernels, "
                f"this version reads layout {native.LAYOUT}",
                self.build,
            )


def built_targets(bundle: Bundle) -> list[str]:
    """Names of the targets this bundle was built for."""
    folder = bundle.root / ENGINES
    return sorted(path.parent.name for path in folder.glob(f"*/{DOCUMENT}")) if folder.is_dir() else []


def open_engine(bundle: Bundle, target: str, gpu: int | None = None) -> Engine:
    """The engine of this name, on this GPU if one is named.

    Raises:
        MissingDependency: the bundle was not built for the target.
        MoiieError: the engine is damaged, of a newer schema, for a backend that is not there, or was built from another
            export of the bundle; or a GPU is named for what runs on none.
    """
    folder = bundle.path(f"{ENGINES}/{target}")
    if not (folder / DOCUMENT).is_file():
        build = build_command(bundle.root, target, {})
        there = built_targets(bundle)
        close = difflib.get_close_matches(target, there, n=1)
        hint = f"did you mean {close[0]}? else: {build}" if close else build
        said = f"{bundle.root}: not built for target {target!r} (built: {', '.join(there) or 'none'})"
        raise MissingDependency(said, hint)
    raw, top = read_document(bundle, target)
    changed = changed_source(bundle, raw)
    build = _again(bundle, target, raw)
    if changed is not None:
        raise MoiieError(f"{folder}: was built from another export of this bundle ({changed} differs)", build)
    check_sections(top)
    backend = top.string("backend")
    check_known(backend, f"{folder / DOCUMENT}: ", f"install the package that adds it, or {build}")
    threads = top.optional_integer("threads", 1)
    built = _in_place(bundle, top, target)
    engine = Engine(target, backend, built, _needs(top), threads, top.boolean("prepack"), bundle, raw)
    return engine if gpu is None else engine.on(gpu)


def refuse_gpu(form: str, gpu: int | None) -> None:
    """For what is no built form, which runs on no GPU.

    Raises:
        MoiieError: one is named.
    """
    if gpu is not None:
        raise MoiieError(f"gpu: {form} is no form that was built for a GPU", "name the target of one")


def read_document(bundle: Bundle, target: str) -> tuple[dict[str, Any], Fields]:
    """engine.json of a target, as it is and for strict reading.

    Raises:
        MoiieError: it is missing, damaged, or of a newer schema.
    """
    path = bundle.path(f"{ENGINES}/{target}/{DOCUMENT}")
    raw = read_json_object(path, MAX_MANIFEST_BYTES, _again(bundle, target, {}))
    top = Fields(raw, str(path), hint=_again(bundle, target, raw))
    if top.integer("schema", 1) > SCHEMA:
        raise MoiieError(f"{path}: written by a newer version", "update moiie-export, or build it again")
    return raw, top


def _again(bundle: Bundle, target: str, raw: Mapping[str, Any]) -> str:
    """What to do about one that is damaged, which a build may take for up to date."""
    return f"build it again: {build_command(bundle.root, target, raw)} --force"


def changed_source(bundle: Bundle, raw: Mapping[str, Any]) -> str | None:
    """A file of the bundle that is not the one an engine was built from: it would answer with an earlier model."""
    source = raw.get("source")
    recorded = source if isinstance(source, dict) else {}
    changed = (name for name, record in bundle.files.items() if _counts(name) and recorded.get(name) != record.sha256)
    return next(changed, None)


def _counts(name: str) -> bool:
    return name.startswith("onnx/")


def _in_place(bundle: Bundle, top: Fields, target: str) -> Bundle:
    prefix = f"{ENGINES}/{target}/"
    components = {name: replace(each, file=prefix + each.file) for name, each in read_components(top).items()}
    files = {prefix + name: record for name, record in read_files(top).items()}
    kv_cache = KvSettings(bundle.kv_cache.layout, top.child("kv_cache").string("dtype"), bundle.kv_cache.capacity)
    engine = replace(
        bundle,
        components={**bundle.components, **components},
        residency={**bundle.residency, **read_residency(top)},
        files={**bundle.files, **files},
        kv_cache=kv_cache,
        weights_file=prefix + top.string("weights_file"),
        prefill_chunk=top.optional_integer("prefill_chunk", 1),
    )
    for component in components.values():
        if component.file not in files:
            raise top.error("components", f"graphs that `files` lists, among them {component.file}")
    return engine


def _needs(top: Fields) -> dict[str, str]:
    needs = top.optional_child("needs")
    return {} if needs is None else {name: needs.string(name) for name in needs.data}
