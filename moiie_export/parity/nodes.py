"""The custom nodes of a graph and their attributes, against what this checkpoint's model demands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from moiie_export.model_config import ModelConfig
from moiie_export.mome_config import MomeConfig
from moiie_export.ops import DOMAIN
from moiie_export.parity.report import Check, tell

Attributes = Mapping[str, Any]
Expected = dict[str, list[tuple[int, Attributes]]]
"""Op type -> for each of its nodes, in graph order, the layer (of the decoder or the ADT) and its attributes."""

_COUNTED = ("CachedAttention", "ExpertDispatch", "AdapterDispatch", "DeformableSample")
"""Ops without which a layer would do something else. The others feed these, and values judge them."""


def check_nodes(config: ModelConfig, graph: str, model: onnx.ModelProto) -> list[Check]:
    """One check for a graph; the note names the first layer that differs. Backends' own kernels obey attributes."""
    expected, counts = _expected(config, graph), dict.fromkeys(_COUNTED, 0)
    differences: list[tuple[int, str]] = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        index = counts.get(node.op_type, 0)
        counts[node.op_type] = index + 1
        wanted = expected.get(node.op_type, [])
        if index >= len(wanted):
            last = wanted[-1][0] if wanted else 0
            differences.append((last, f"{len(wanted)} nodes {node.op_type} expected, found more"))
            continue
        layer, attributes = wanted[index]
        found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        differences += [
            (layer, f"{node.op_type}.{key} is {found.get(key)}, expected {value}")
            for key, value in attributes.items()
            if found.get(key) != value
        ]
    for op_type in _COUNTED:
        wanted = expected.get(op_type, [])
        if counts[op_type] < len(wanted):
            layer = wanted[counts[op_type]][0]
            differences.append((layer, f"{len(wanted)} nodes {op_type} expected, found {counts[op_type]}"))
    differences.sort(key=lambda item: item[0])
    first = differences[0][0] if differences else None
    where = graph if first is None else f"layer {first}"
    return [tell("attributes", [text for _, text in differences], phase=graph, where=where, layer=first)]


def _expected(config: ModelConfig, graph: str) -> Expected:
    if graph.startswith("decoder_"):
        return _of_decoder(config, decode=graph == "decoder_decode")
    if isinstance(config, MomeConfig):
        depths = {expert.component: expert.adt.num_layers for expert in config.experts if expert.adt is not None}
        return {"DeformableSample": [(layer, {}) for layer in range(depths.get(graph, 0))]}
    return {}


def _of_decoder(config: ModelConfig, decode: bool) -> Expected:
    """A decode graph knows language tokens only."""
    text, moe = config.text, config.moe
    attention = {"local_window_size": text.visible_keys or 0, "num_key_value_heads": text.num_key_value_heads}
    expected: Expected = {"CachedAttention": [(layer, attention) for layer in range(text.num_hidden_layers)]}
    if isinstance(config, MomeConfig):
        expected["AdapterDispatch"] = [(layer, {}) for layer in config.mole.layers]
    if moe is None:
        return expected
    language = list(moe.expert_groups["language"])
    experts = {"experts": sorted(language) if decode else list(moe.reachable)}
    expected["ExpertDispatch"] = [(layer, experts) for layer in moe.layers]
    if moe.gates:
        router: dict[str, Any] = {"language_experts": language, "num_experts": moe.num_experts}
        router |= {} if decode else {"vision_experts": list(moe.expert_groups["vision"])}
        expected["ModalityRouter"] = [(layer, router) for layer in moe.layers]
        expected["TopKRoute"] = [(layer, {"top_k": moe.top_k}) for layer in moe.layers]
    return expected
