"""Synthetic checkpoints exported once: kept in build/ under a hash of the exporter's sources, for all tests and workers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moiie_export.convert import convert
from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_export.recipe import Recipe, load_recipe
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from tests.mome_golden import minilm
from tests.mome_layout import write_layout
from tests.synthetic import write_checkpoint
from tests.tracing import traced_once

ROOT = Path(__file__).parent.parent
Storage = Literal["float32", "float16"]
BUNDLES = ROOT / "build" / "test-bundles"


@dataclass(frozen=True)
class Exported:
    """A synthetic checkpoint and its bundle; both are shared, so copy before you change anything."""

    checkpoint: Path
    bundle: Path
    recipe: Recipe


_APART = {"builders", "check", "cli", "demo", "parity", "report", "targets.py"}
"""Parts of the exporter that no export reads."""


@cache
def sources_digest() -> str:
    """Hex digest of everything that decides what an export of a given checkpoint writes."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "moiie_export").rglob("*.py"), *(ROOT / "runtime").glob("tensor*.py")]
    sources = [path for path in sources if not _APART & {*path.relative_to(ROOT).parts}]
    sources = [path for path in sources if not path.stem.startswith(("cpu_", "trt"))]
    for path in sorted([*sources, *(ROOT / "recipes").glob("*.yaml"), *(ROOT / "tests").glob("synthetic*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def small_recipe(storage: Storage = "float32", max_context: int = 64) -> Recipe:
    """The default recipe with a short context."""
    recipe = load_recipe("default")
    return replace(recipe, export=replace(recipe.export, dtype=storage, max_context=max_context))


def exported(
    settings: Mapping[str, Any],
    storage: Storage = "float32",
    max_context: int = 64,
    rules: Sequence[Mapping[str, Any]] = (),
) -> Exported:
    """The checkpoint that `write_checkpoint(**settings)` writes, and its bundle with weights stored as `storage`.

    `rules` are those of the recipe's section `quantization`.
    """
    key = hashlib.sha256(json.dumps([storage, max_context, settings, *rules], sort_keys=True).encode()).hexdigest()[:16]
    folder = BUNDLES / sources_digest() / f"synthetic-{key}"
    section = QuantizationSection(tuple(QuantRule(**rule) for rule in rules))
    recipe = replace(small_recipe(storage, max_context), quantization=section)
    result = Exported(folder / "checkpoint", folder / "bundle", recipe)
    return _kept(result, folder, lambda: write_checkpoint(result.checkpoint, **settings))


def exported_mome(max_context: int = 512) -> Exported:
    """The golden end-to-end MoME with the real sentence encoder, converted and exported."""
    folder = BUNDLES / sources_digest() / f"mome-{max_context}"
    result = Exported(folder / "official" / "out", folder / "bundle", small_recipe(max_context=max_context))

    def write() -> None:
        shutil.rmtree(folder / "official", ignore_errors=True)
        layout = write_layout(folder / "official")
        layout.sizes({})
        convert(replace(layout.originals, sentence=minilm()), result.checkpoint, layout.path / "mome.json")

    return _kept(result, folder, write)


def _kept(wanted: Exported, folder: Path, write: Callable[[], object]) -> Exported:
    """Write the checkpoint and export it, unless this or another process has done so already."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.bundle.is_dir():
            write()
            with traced_once():
                export_bundle(ExportRequest(wanted.checkpoint, wanted.bundle, wanted.recipe))
    return wanted


SMALLEST: dict[str, Any] = {"layers": 1, "moe_layers": "all", "vocab": 288}
"""A whole MoIIE model in one decoder layer: what exports fastest."""


FUSIBLE = {
    "hidden": 64,
    "intermediate": 96,
    "heads": 4,
    "kv_heads": 2,
    "backbone": "llama",
    "tower": (32, 64, 2, 2, 28, 14),
}
"""Sizes for lowerings: heads of 16, which fused attention can rotate inside; rows that groups of 32 divide."""
MIXED_RULES = (
    {"match": ("*experts.0.*", "lm_head"), "format": "int8"},
    {"match": ("experts", "dense", "attention"), "format": "int4"},
    {"match": ("vision_tower",), "format": "int8"},
)
"""Vision-only experts in another form than the others, a head of its own, and biases in the tower."""


def smallest_with_room() -> Exported:
    """The smallest model with a context that holds parity's own prompts."""
    return exported(SMALLEST, "float32", 256)
