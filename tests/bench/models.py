"""The models that are measured: synthetic checkpoints, the recipe for int4, bundles and their built forms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
_TINY_TOWER = (64, 128, 2, 4, 28, 14)


@dataclass(frozen=True)
class Shape:
    """A decoder. `experts` 0: dense; else every layer holds that many, and a token goes to `top_k` of them."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 16
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 32064
    experts: int = 0
    top_k: int = 2

    @property
    def parameters(self) -> int:
        """Weights of the decoder with embeddings, norms left out."""
        size = self.hidden // self.heads
        attention = 2 * self.hidden * size * (self.heads + self.kv_heads)
        feed_forward = 3 * self.hidden * self.intermediate * max(1, self.experts) + self.hidden * self.experts
        return self.layers * (attention + feed_forward) + 2 * self.vocab * self.hidden


SHAPES = {"dense": Shape(), "moe": Shape(experts=4)}
SMALL = {
    name: Shape(hidden=256, intermediate=512, layers=4, heads=4, kv_heads=2, vocab=1024, experts=experts)
    for name, experts in (("dense", 0), ("moe", 4))
}
"""The same two so small that only the harness is tested."""


def write_shape(shape: Shape, checkpoint: Path, dtype: str = "F32") -> Path:
    """A checkpoint of this shape in one file, unless it is there already."""
    if not (checkpoint / "generation_config.json").is_file():  # what is written last
        from tests.synthetic import write_checkpoint

        sizes = {key: value for key, value in asdict(shape).items() if key != "experts"}
        write_checkpoint(
            checkpoint,
            **sizes,
            experts=max(1, shape.experts),
            backbone="llama",
            variant="vanilla" if shape.experts else "dense",
            moe_layers="all",
            tower=_TINY_TOWER,
            dtype=dtype,
            shard_bytes=1 << 40,
        )
    return checkpoint


@dataclass(frozen=True)
class Precision:
    """How weights are stored: the decoder's as `format` in groups, the rest as `dtype`; "float32" quantises nothing."""

    format: str = "int4"
    group_size: int = 32
    method: str = "rtn"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For file names and tables."""
        return self.format if self.format == self.dtype else f"{self.format}-g{self.group_size}-{self.method}"

    def recipe(self, banks: tuple[str, ...], max_context: int) -> dict[str, Any]:
        """A recipe that quantises these banks."""
        made: dict[str, Any] = {
            "schema": 1,
            "extends": "default",
            "description": "for a benchmark",
            "export": {"dtype": self.dtype, "max_context": max_context},
        }
        if self.format != self.dtype:
            rule = {"format": self.format, "group_size": self.group_size, "method": self.method}
            made["quantization"] = {"rules": [{"match": list(banks), **rule}]}
        return made


def decoder_banks(shape: Shape) -> tuple[str, ...]:
    """What is quantised of a shape: all matrices of its decoder but the gates."""
    return ("attention", "experts" if shape.experts else "dense", "lm_head")


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    """The recipe as a file; JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return path


PORTABLE = "portable"
"""Instead of a target: the bundle's own graphs, which nothing is built for."""


def moiie(*arguments: str | Path) -> list[str]:
    """A command line of the exporter in this interpreter."""
    return [sys.executable, "-m", "moiie_export.cli", *map(str, arguments)]


def export(checkpoint: Path, bundle: Path, recipe: Path) -> Path:
    """`moiie export`; what is up to date is kept.

    Raises:
        RuntimeError: it failed.
    """
    _run(moiie("export", recipe, "--checkpoint", checkpoint, "-o", bundle))
    return bundle


def build(bundle: Path, target: str) -> Path:
    """`moiie build`; what is up to date is kept.

    Raises:
        RuntimeError: it failed.
    """
    _run(moiie("build", bundle, "--target", target))
    return bundle / "engines" / target


def folder_bytes(folder: Path) -> dict[str, int]:
    """Sizes of all files below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
