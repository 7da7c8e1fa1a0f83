"""Graphs of a bundle in a TensorRT dialect, and inputs for them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from moiie_export.builders.engine_specs import decode_experts
from moiie_export.graph.trt import lower
from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_experts import stored_numbers
from moiie_export.targets import BUILT_IN, Target
from moiie_runtime.bundle import Bundle

SIZES = {"batch": 1, "sequence": 6, "kept": 1, "images": 1, "adapters": 1, "texts": 1, "words": 7, "patches": 40}
DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
}


@dataclass(frozen=True)
class Lowered:
    """A graph in a dialect."""

    model: ir.Model
    context: TrtContext

    def save(self, folder: Path) -> Path:
        """The ONNX file, its weights beside it."""
        path = folder / f"{self.context.component}.onnx"
        ir.save(self.model, path, external_data=f"{self.context.component}.data")
        return path

    def types(self, op_type: str, index: int) -> set[Any]:
        """Element types of an input of all nodes of a type."""
        return {node.inputs[index].dtype for node in self.model.graph if node.op_type == op_type}  # type: ignore[union-attr]

    def ops(self) -> set[tuple[str, str]]:
        """Domain and type of every node."""
        return {(node.domain, node.op_type) for node in self.model.graph}

    def nodes(self, op_type: str) -> list[ir.Node]:
        """Nodes of a type, in order."""
        return [node for node in self.model.graph if node.op_type == op_type]


def target(name: str, **changes: Any) -> Target:
    """A built-in target with changes."""
    return replace(BUILT_IN[name], **changes)


def lowered(bundle: Path, component: str, wanted: Target, islands: tuple[str, ...] = ()) -> Lowered:
    """A component of a bundle in a target's dialect."""
    opened = Bundle.open(bundle)
    context = TrtContext(component, wanted, decode_experts(opened), frozenset(islands))
    return Lowered(lower(opened.path(opened.components[component].file), context), context)


def feeds(bundle: Path, component: str, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of the portable graph: five keys are in the buffers, three tokens are vision."""
    rng = np.random.default_rng(seed)
    document = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    values: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in document["components"][component]["inputs"]:
        shape = [SIZES[dim] if isinstance(dim, str) else dim for dim in tensor["shape"]]
        values[tensor["name"]] = rng.standard_normal(shape).astype(np.float32)
    fixed = {"past_lengths": [5], "logits_to_keep": [[4]], "token_modality": [[1, 1, 1, 0, 0, 0]]}
    kinds = {"past_lengths": np.int64, "logits_to_keep": np.int64, "token_modality": np.int32}
    return values | {name: np.array(value, kinds[name]) for name, value in fixed.items() if name in values}


def dialect_feeds(made: Lowered, given: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The same inputs as a dialect's graph wants them, with its banks."""
    banks = {
        name: np.stack([stored_numbers(each) for each in tensors])
        for bank in made.context.banks
        for name, tensors in bank.tensors.items()
    }
    wanted = {str(value.name): value.dtype for value in made.model.graph.inputs}
    return {name: {**given, **banks}[name].astype(dtype.numpy()) for name, dtype in wanted.items() if dtype is not None}
