"""Checkpoints of full size whose weights are holes in their files: headers say what there is, the disk holds next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiie_export.graph_stage import write_graph
from moiie_export.quantize.rules import resolve
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_export.source import ModelSource
from moiie_export.weights_stage import WEIGHTS_FILE, WeightsJob
from moiie_runtime.tensor_header import Specs, build_header
from tests import synthetic, synthetic_mome
from tests.bench.full import MODELS
from tests.tracing import traced_once

Shapes = Mapping[str, tuple[int, ...]]
TOWER = (1152, 4304, 27, 16, 384, 14)
"""SigLIP so400m/14 at 384 pixels."""


RULES = (QuantRule(("lm_head",), "int8"), QuantRule(("experts", "attention"), "int4"))
"""Of the decoders that are lowered: as the recipes for small devices store them."""
INT8_ATTENTION = (QuantRule(("lm_head", "attention"), "int8"), QuantRule(("experts",), "int4"))


def write_hollow(path: Path, specs: Specs) -> None:
    """A safetensors file that reads as zeros; scales are 1, for parsers that look at them."""
    head, header = build_header(path, specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(head)
        for name, info in header.items():
            if name.endswith(".scales"):
                file.seek(info.offset)
                file.write(np.ones(info.shape, np.float16).tobytes())
        file.truncate(len(head) + sum(info.nbytes for info in header.values()))


def write_graphs(
    directory: Path, name: str, graphs: Sequence[str], capacity: int, rules: tuple[QuantRule, ...] = RULES
) -> None:
    """Graphs of `phi3` or `llama3` at their real widths, in `directory`/onnx.

    Two layers of decoder, both with experts, and two of the tower; few words.
    """
    checkpoint = write_full_size(
        directory / name, name, layers=2, moe_layers="all", vocab=512, tower=(*TOWER[:2], 2, *TOWER[3:])
    )
    (directory / "onnx").mkdir(parents=True)
    with ModelSource.open(checkpoint) as source, traced_once():
        resolved = resolve(QuantizationSection(rules), "float16", source.weight_map, source.config)
        source.weight_map = resolved.weight_map
        write_hollow(directory / WEIGHTS_FILE, WeightsJob.of(source, resolved).specs())
        for graph in graphs:
            write_graph(graph, source, capacity, directory, resolved.schemes)


def write_full_size(directory: Path, name: str, **changes: Any) -> Path:
    """The checkpoint `phi3` (7.9 B parameters), `llama3` (16.9 B) or `mome` (8.5 B), for what reads headers only.

    `changes`: fields of `Synthetic` that differ, for the first two.
    """

    def shard(path: Path, tensors: Shapes, model: synthetic.Synthetic) -> None:
        write_hollow(path, {name: (model.dtype, shape) for name, shape in tensors.items()})

    def tensors(path: Path, found: Mapping[str, Any]) -> None:
        write_hollow(path, {name: ("F16", shape) for name, shape in found.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_write_shard", shard)
        patch.setattr(synthetic_mome, "save_tensors", tensors)
        patch.setattr(synthetic_mome, "_values", lambda _, shape, __: shape)
        if name == "mome":
            synthetic_mome.write_mome_checkpoint(directory, {})
        else:
            synthetic.write_checkpoint(directory, **{**MODELS[name], "tower": TOWER, **changes})
    return directory
