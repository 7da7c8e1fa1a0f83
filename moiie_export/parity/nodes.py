"""The custom nodes of a graph and their attributes, against what this checkpoint's model demands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx

from moiie_export.model_config import ModelConfig
from moiie_export.mome_config import MomeConfig
from moiie_export.ops import DOMAIN
from moiie_export.ops.quantized_expert_dispatch import PLAIN_BITS
from moiie_export.parity.report import Check, tell
from moiie_export.quantize.scheme import Scheme

Attributes = Mapping[str, Any]
Expected = dict[str, list[tuple[int, Attributes]]]
"""Op type -> for each of its nodes, in graph order, the layer (of the decoder or the ADT) and its attributes."""

_COUNTED = ("CachedAttention", "ExpertDispatch", "AdapterDispatch", "DeformableSample")
"""Ops without which a layer would do something else. The others feed these, and values judge them."""


def check_nodes(config: ModelConfig, graph: str, model: onnx.ModelProto, schemes: Mapping[str, Scheme]) -> list[Check]:
    """One check for a graph; the note names the first layer that differs. Backends' own kernels obey attributes.

    Args:
        config: the checkpoint's model.
        graph: the component.
        model: its parsed graph.
        schemes: parameter -> how it is quantised, of those that are.
    """
    expected, counts = _expected(config, graph), dict.fromkeys(_COUNTED, 0)
    differences: list[tuple[int, str]] = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type in _READS:
            differences += _READS[node.op_type](node, found, schemes)
        if node.op_type == "QuantizedLinear":  # values judge their number, as that of other linear layers
            continue
        op_type = "ExpertDispatch" if node.op_type == "QuantizedExpertDispatch" else node.op_type
        index = counts.get(op_type, 0)
        counts[op_type] = index + 1
        wanted = expected.get(op_type, [])
        if index >= len(wanted):
            last = wanted[-1][0] if wanted else 0
            differences.append((last, f"{len(wanted)} nodes {node.op_type} expected, found more"))
            continue
        layer, attributes = wanted[index]
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


def _linear(node: onnx.NodeProto, found: Attributes, schemes: Mapping[str, Scheme]) -> Iterator[tuple[int, str]]:
    """A quantised linear layer's attributes against its weight's form."""
    parameter = node.input[1]
    yield from _form(parameter, schemes.get(parameter), (found.get("bits"), found.get("group_size")))


def _experts(node: onnx.NodeProto, found: Attributes, schemes: Mapping[str, Scheme]) -> Iterator[tuple[int, str]]:
    """A quantised dispatch's attributes against the form of each expert's two weights; plain ones have 16 or 32 bits."""
    pattern = re.compile(r"decoder\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate_up|down)_proj")
    experts = list(found.get("experts", ()))
    for name in node.input:
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) not in experts:
            continue
        place, kind = experts.index(int(match[1])), match[2]
        bits, size = (list(found.get(f"{kind}_{what}", ())) for what in ("bits", "group_sizes"))
        if len(bits) != len(experts) or len(size) != len(experts):
            yield _layer_of(name), f"{kind}_bits {bits} and {kind}_group_sizes {size} are not of {len(experts)} experts"
        elif name in schemes or bits[place] < PLAIN_BITS:
            yield from _form(name, schemes.get(name), (bits[place], size[place]))


def _form(parameter: str, scheme: Scheme | None, found: tuple[Any, Any]) -> Iterator[tuple[int, str]]:
    expected = None if scheme is None else (scheme.bits, scheme.group_size)
    if found != expected:
        stored = "not quantised" if expected is None else f"{expected[0]} bits in groups of {expected[1]}"
        yield _layer_of(parameter), f"{parameter} is read as {found[0]} bits in groups of {found[1]}, stored {stored}"


def _layer_of(parameter: str) -> int:
    match = re.search(r"layers\.(\d+)\.", parameter)
    return 0 if match is None else int(match[1])


_READS = {"QuantizedLinear": _linear, "QuantizedExpertDispatch": _experts}


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
