"""Exported graphs opened for inspection, and a small synthetic model to export in other ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moiie_export.graph_stage import write_graph
from moiie_export.source import ModelSource
from moiie_export.weights_stage import WEIGHTS_FILE, WeightsJob, write_weights
from moiie_runtime.tensors import TensorFile
from tests.synthetic import write_checkpoint

SHAPES = {
    "dense_phi3": "no experts",
    "modality_hard_phi3": "no router",
    "modality_moe_phi3": "experts kept apart",
    "moiie_llama3": "grouped keys, split projections, the tower in the checkpoint",
    "moiie_phi3_s2": "several scales, a window",
}
"""Golden cases whose graphs differ in structure; the others differ in numbers only."""

GRAPHS = ("vision_encoder", "decoder_prefill", "decoder_decode")
CAPACITY = 48


@dataclass(frozen=True)
class Graph:
    """One .onnx file of a bundle, weights not loaded."""

    path: Path

    @property
    def name(self) -> str:
        """Its component."""
        return self.path.stem

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The file as a protobuf."""
        return onnx.load(self.path, load_external_data=False)

    @cached_property
    def functions(self) -> dict[tuple[str, str, str], onnx.FunctionProto]:
        """(domain, op, overload) -> body."""
        return {(f.domain, f.name, f.overload): f for f in self.model.functions}

    def body(self, node: onnx.NodeProto) -> onnx.FunctionProto | None:
        """The function a node calls."""
        return self.functions.get((node.domain, node.op_type, node.overload))

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Every node, those of function bodies and subgraphs included."""
        for holder in (self.model.graph, *self.model.functions):
            yield from _deep(holder.node)

    @cached_property
    def external(self) -> dict[str, dict[str, str]]:
        """Initialiser -> where its bytes lie, for those outside the file."""
        stored = [item for item in self.model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
        return {item.name: {entry.key: entry.value for entry in item.external_data} for item in stored}

    def inline(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor whose bytes lie in the file: initialisers, and attributes of nodes."""
        for item in self.model.graph.initializer:
            if item.name not in self.external:
                yield item.name, numpy_helper.to_array(item)
        for node in self.nodes():
            for attribute in node.attribute:
                value = helper.get_attribute_value(attribute)
                if isinstance(value, onnx.TensorProto):
                    yield f"{node.name}.{attribute.name}", numpy_helper.to_array(value)
                elif attribute.type == onnx.AttributeProto.INTS or attribute.type == onnx.AttributeProto.FLOATS:
                    yield f"{node.name}.{attribute.name}", np.array(value)


def _deep(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _deep(attribute.g.node)


@dataclass(frozen=True)
class Bundle:
    """An exported bundle."""

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """bundle.json."""
        manifest: dict[str, Any] = json.loads((self.path / "bundle.json").read_text(encoding="utf-8"))
        return manifest

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """Its graphs by component."""
        return {name: Graph(self.path / "onnx" / f"{name}.onnx") for name in GRAPHS}

    @cached_property
    def weights(self) -> TensorFile:
        """Its weights file."""
        return TensorFile(self.path / WEIGHTS_FILE)


@pytest.fixture(params=SHAPES)
def bundle(request: pytest.FixtureRequest, golden_bundle: Callable[[str], Path]) -> Bundle:
    """Each structurally different golden case as a bundle."""
    return _open(golden_bundle(request.param))


@cache
def _open(path: Path) -> Bundle:
    return Bundle(path)


@dataclass
class Tiny:
    """A synthetic checkpoint and the graphs that were written from it."""

    source: ModelSource
    directory: Path

    def graph(self, name: str, dtype: str = "float32", to: str = "float32") -> Graph:
        """One graph and the weights beside it, written once a directory."""
        target = self.directory / to
        (target / "onnx").mkdir(parents=True, exist_ok=True)
        if not (target / WEIGHTS_FILE).is_file():
            write_weights(WeightsJob.plain(self.source, dtype), target / WEIGHTS_FILE, lambda *_: None)
        graph = Graph(target / "onnx" / f"{name}.onnx")
        if not graph.path.is_file():
            write_graph(name, self.source, CAPACITY, target)
        return graph


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Eight experts of which one is dead, three per token, in both layers; grouped keys; a short window."""
    directory = tmp_path_factory.mktemp("tiny")
    settings: dict[str, Any] = {"experts": 8, "top_k": 3, "moe_layers": "all", "kv_heads": 2, "sliding_window": 6}
    settings["dtype"] = "F32"  # bfloat16 values would survive float16 unchanged
    with ModelSource.open(write_checkpoint(directory / "model", **settings)) as source:
        yield Tiny(source, directory)
