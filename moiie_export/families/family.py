"""What the exporter asks of a model family: one record for each, so that no stage asks for a model's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moiie_export.weights import WeightMap

if TYPE_CHECKING:
    from torch import nn

    from moiie_export.graph.components import Component
    from moiie_export.model.prompts import Look
    from moiie_export.parity.sight import Sight
    from moiie_export.source import ModelSource

HOST = "host"
"""Stands beside the graphs for what the runtime itself reads: the embedding table, adapters."""

PREFILL, DECODE = "decoder_prefill", "decoder_decode"


@dataclass(frozen=True)
class Family:
    """A model family. `config` is its own class of ModelConfig; what needs torch imports it when it is called.

    Attributes:
        graphs: config -> names of the bundle's graphs.
        weight_map: (config, rows of the embedding in the checkpoint, source -> tensor names) -> which tensors make up
            which weights.
        expected_users: (parameter, config) -> the graphs, or HOST, that must use it.
        sections: source -> the sections of bundle.json that only this family has, merged into the common ones.
        text_files: source -> small files of the bundle beside tokenizer and configs.
        model: config -> the reference model, on whatever device torch is told to use.
        components: (config, capacity of the key-value buffers) -> what is traced.
        looks: (the model layer by layer, questions, watcher or None) -> what becomes of each question's pictures and
            instruction before the decoder.
        sight: (VLM, the bundle's marked graphs, reference, bounds) -> how parity compares what comes before the decoder.
    """

    graphs: Callable[[Any], tuple[str, ...]]
    weight_map: Callable[[Any, int, Mapping[str, Iterable[str]]], WeightMap]
    expected_users: Callable[[str, Any], frozenset[str]]
    sections: Callable[[ModelSource], dict[str, Any]]
    text_files: Callable[[ModelSource], dict[str, bytes]]
    model: Callable[[Any], nn.Module]
    components: Callable[[Any, int], tuple[Component, ...]]
    looks: Callable[..., list[Look]]
    sight: Callable[..., Sight]
