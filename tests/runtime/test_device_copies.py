"""Weights that an engine multiplies out: which of them, and the same before the export and of what was built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export.check.memory import _copies as predicted
from moiie_export.check.model_ops import stored_weights
from moiie_export.quantize.rules import resolve
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_export.source import ModelSource
from moiie_runtime.backends.device import ITEM_BYTES
from moiie_runtime.bundle import Bundle
from moiie_runtime.device_copies import copied_numbers
from moiie_runtime.device_memory import _copies as found
from moiie_runtime.tensors import TensorFile
from tests.exports import FUSIBLE, MIXED_RULES, exported
from tests.trt_graphs import target

HEAD = ("decoder.lm_head.weight", "int8", 1000)
LAYERS = [
    ("decoder.layers.0.mlp.experts.0.gate_up_proj", "int8", 7),
    ("decoder.layers.0.mlp.experts.1.gate_up_proj", "int4", 11),
    ("decoder.layers.1.mlp.experts.0.gate_up_proj", "int8", 5),
    ("decoder.layers.1.mlp.experts.1.gate_up_proj", "fp8", 17),
    ("decoder.layers.1.self_attn.o_proj.weight", "int4", 50),
]


def test_of_experts_one_layer_is_copied_at_a_time() -> None:
    for plugins in ("off", "optional"):
        assert copied_numbers(LAYERS, "rtx", plugins, "inputs") == 5 + 17
        assert copied_numbers(LAYERS[:2], "rtx", plugins, "inputs") == 7 + 11
        assert copied_numbers(LAYERS[:2], "rtx", plugins, "constants") == 7
    assert copied_numbers(LAYERS, "rtx", "required", "inputs") == 0
    assert copied_numbers([], "rtx", "off", "inputs") == 0


def test_of_linear_layers_in_eight_bits_one_layer_is_where_that_was_seen() -> None:
    linear = [
        HEAD,
        ("decoder.layers.3.self_attn.qkv_proj.weight", "int8", 600),
        ("decoder.layers.3.self_attn.o_proj.weight", "fp8", 500),
        ("decoder.layers.13.self_attn.o_proj.weight", "int8", 700),
        ("decoder.layers.13.mlp.gate_up_proj.weight", "int4", 9000),
    ]
    for plugins in ("off", "required"):
        assert copied_numbers(linear, "rtx", plugins, "constants") == 600 + 500
        assert copied_numbers([*linear, HEAD], "rtx", plugins, "constants") == 2000
        assert copied_numbers(linear, "trt10", plugins, "constants") == 0
    assert copied_numbers([*linear, *LAYERS], "rtx", "off", "inputs") == 600 + 500 + 5 + 17


@pytest.mark.parametrize("banks", ["inputs", "constants"])
@pytest.mark.parametrize("plugins", ["required", "off"])
def test_a_built_engine_copies_what_check_said(banks: Any, plugins: Any) -> None:
    """Engines are not built for this: their graphs use the weights that the bundle's own do."""
    made = exported({**FUSIBLE, "layers": 2}, "float32", 256, MIXED_RULES)
    wanted = target("rtx", banks=banks, plugins=plugins)
    section = QuantizationSection(tuple(QuantRule(**rule) for rule in MIXED_RULES))
    with ModelSource.open(made.checkpoint) as source:
        resolved = resolve(section, "float32", source.weight_map, source.config)
        weights = stored_weights(source.config, resolved)
    bundle = Bundle.open(made.bundle)
    engine: Any = SimpleNamespace(backend="tensorrt_rtx", portable=bundle)
    header = TensorFile(bundle.path(bundle.embed_tokens.file)).header
    settings = {"dialect": "rtx", "plugins": plugins, "banks": banks}
    for component, phase in bundle.phases.items():
        said = predicted(weights, wanted, component)
        assert said == found(engine, settings, header, phase) * ITEM_BYTES["float16"]
        if component == "decoder_prefill":
            experts = 0 if plugins == "required" else 3 * 96 * 64 * (4 if banks == "inputs" else 1)
            assert said == 2 * (320 * 64 + experts)
        if component == "vision_encoder":
            assert said > 0
