"""Tracing and writing a small model in other ways: float16, twice, with buffers that have no data; run beside PyTorch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from moiie_export.graph.components import Component, Tensor
from moiie_export.graph.passes import PassContext, attach_weights
from moiie_export.graph.trace import trace
from moiie_export.model.load import load_model
from moiie_export.weights import WeightMap
from moiie_export.weights_stage import WEIGHTS_FILE
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile

CAPACITY = 48
Arrays = dict[str, np.ndarray]


def session(graph: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])


def run(graph: Any, feeds: Arrays) -> Arrays:
    opened = session(graph)
    return dict(zip([output.name for output in opened.get_outputs()], opened.run(None, feeds), strict=True))


def buffers(cache: list[tuple[torch.Tensor, torch.Tensor]]) -> Arrays:
    kinds = ("key", "value")
    return {
        f"past_key_values.{layer}.{kind}": buffer.numpy()
        for layer, pair in enumerate(cache)
        for kind, buffer in zip(kinds, pair, strict=True)
    }


def compare(found: Arrays, expected: Any, moe_layers: tuple[int, ...]) -> None:
    """Logits, buffers and routing of a graph against the PyTorch decoder's output."""
    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-4, rtol=1e-4)
    for layer, pair in enumerate(expected.present):
        for kind, buffer in zip(("key", "value"), pair, strict=True):
            np.testing.assert_allclose(found[f"present.{layer}.{kind}"], buffer, atol=1e-4, rtol=1e-4)
    for layer in moe_layers:
        routing = expected.routing[layer]
        np.testing.assert_array_equal(found[f"expert_ids.{layer}"], routing.expert_ids)
        np.testing.assert_allclose(found[f"expert_weights.{layer}"], routing.expert_weights, atol=1e-5)
        np.testing.assert_allclose(found[f"router_logits.{layer}"], routing.router_logits, atol=1e-4)


def inputs(config: Any, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, tokens, config.text.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prefill(tiny: Any) -> Any:
    """Logits, buffers and routing of a ragged batch of two in PyTorch."""
    model, config = load_model(tiny.source), tiny.source.config
    assert config.moe.reachable == tuple(range(7))
    assert config.moe.layers == (0, 1)
    modality = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    embeds, past = inputs(config, 2, 11), torch.zeros(2, dtype=torch.int64)
    keep = torch.tensor([[10, 3], [4, 0]])
    with torch.no_grad():
        output = model.decoder(embeds, modality, past, keep, model.new_cache(2, CAPACITY))
    feeds = {"inputs_embeds": embeds, "token_modality": modality, "past_lengths": past, "logits_to_keep": keep}
    arrays = {name: value.numpy() for name, value in feeds.items()}
    return model, {**arrays, **buffers(model.new_cache(2, CAPACITY))}, output


def test_prefill_in_onnxruntime_equals_pytorch(tiny: Any, prefill: Any) -> None:
    """Dead expert, three experts per token, all layers sparse, grouped keys, a window shorter than the row, two lengths."""
    _, feeds, expected = prefill
    compare(run(tiny.graph("decoder_prefill"), feeds), expected, (0, 1))


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_decode_in_onnxruntime_equals_pytorch(tiny: Any, prefill: Any, storage: str) -> None:
    """float16 is a way to store weights: both sides compute in float32 with the rounded ones."""
    model, _, before = prefill
    if storage == "float16":
        model = load_model(tiny.source, storage)
    embeds, past = inputs(tiny.source.config, 2, 1, seed=3), torch.tensor([11, 5])
    with torch.no_grad():
        expected = model.decoder(embeds, None, past, None, before.present)
    graph = tiny.graph("decoder_decode", storage, to=storage)
    feeds = {"inputs_embeds": embeds.numpy(), "past_lengths": past.numpy(), **buffers(before.present)}
    compare(run(graph, feeds), expected, (0, 1))
    experts = {int(name.split(".")[-2]) for name in graph.external if ".experts." in name}
    assert experts == set(tiny.source.config.moe.expert_groups["language"]), "decode carries no expert of vision alone"
    kinds = {item.name: item.data_type for item in graph.model.graph.initializer if item.name in graph.external}
    matrices = {name for name in kinds if name.endswith("proj.weight") or ".experts." in name or "lm_head" in name}
    half = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT16}
    assert half == (matrices if storage == "float16" else set())
    if storage == "float16":
        exact = load_model(tiny.source).decoder
        with torch.no_grad():
            difference = (exact(embeds, None, past, None, before.present).logits - expected.logits).abs().max()
        assert float(difference) > 1e-5, "rounding to float16 must be visible, or the comparison shows nothing"


def test_float16_weights_lie_in_the_file_as_they_are_cast(tiny: Any) -> None:
    graph = tiny.graph("decoder_decode", "float16", to="float16")
    blob = (tiny.directory / "float16" / WEIGHTS_FILE).read_bytes()
    with TensorFile(tiny.directory / "float16" / WEIGHTS_FILE) as weights:
        place = graph.external["decoder.layers.1.mlp.experts.6.down_proj"]
        start, length = int(place["offset"]), int(place["length"])
        assert blob[start : start + length] == weights["decoder.layers.1.mlp.experts.down_proj"][6].tobytes()
    casts = [node for node in graph.model.graph.node if node.op_type == "Cast" and node.input[0] in graph.external]
    halves = [i.name for i in graph.model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT16]
    assert sorted(node.input[0] for node in casts) == sorted(halves)
    assert {node.output[0] for node in casts} == {f"{name}.float32" for name in halves}


_EXPORT = """
import sys
from pathlib import Path
from moiie_export.graph_stage import write_graph
from moiie_export.source import ModelSource
from moiie_export.weights_stage import WEIGHTS_FILE, WeightsJob, write_weights
checkpoint, target = Path(sys.argv[1]), Path(sys.argv[2])
(target / "onnx").mkdir(parents=True)
with ModelSource.open(checkpoint) as source:
    write_weights(WeightsJob.plain(source, "float32"), target / WEIGHTS_FILE, lambda *_: None)
    write_graph("decoder_decode", source, int(sys.argv[3]), target)
"""


def test_another_process_writes_the_same_bytes(tiny: Any) -> None:
    """With other hash seeds, so that no order of a set gets into a file."""
    here, there = tiny.graph("decoder_decode").path, tiny.directory / "second"
    arguments = [str(tiny.source.checkpoint.path), str(there), str(CAPACITY)]
    subprocess.run([sys.executable, "-c", _EXPORT, *arguments], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert here.read_bytes() == (there / "onnx" / here.name).read_bytes()
    assert (here.parents[1] / WEIGHTS_FILE).read_bytes() == (there / WEIGHTS_FILE).read_bytes()


class _Buffered(nn.Module):
    """Adds something that is no parameter; made on the meta device, it has no data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        with torch.device("meta"):
            if kind == "buffer":
                self.register_buffer("offsets", torch.arange(4.0))
            else:
                self.offsets = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "computed":
            return x + torch.arange(4.0, device=x.device)
        return x + self.offsets


def small(kind: str) -> Component:
    dims = ("batch", 4)
    return Component(
        "small",
        lambda _: _Buffered(kind),
        (Tensor("x", torch.float32, dims),),
        (Tensor("y", torch.float32, dims),),
        (),
        tuple,
    )


@pytest.mark.parametrize("kind", ["buffer", "constant"])
def test_a_buffer_on_the_meta_device_is_an_error_that_names_it(kind: str) -> None:
    component = small(kind)
    model = trace(component, None)  # type: ignore[arg-type]
    with pytest.raises(MoiieError, match="small: initialiser .* is no parameter of the weight map") as caught:
        attach_weights(model, PassContext(component, WeightMap((), {}), {}, "weights.safetensors"))
    assert next(iter(model.graph.initializers)) in caught.value.message
    assert "outside the meta device" in str(caught.value.hint)


def test_a_constant_computed_in_forward_needs_no_data() -> None:
    level = logging.getLogger("torch.onnx").level
    component = small("computed")
    model = trace(component, None)  # type: ignore[arg-type]
    attach_weights(model, PassContext(component, WeightMap((), {}), {}, "weights.safetensors"))
    assert [(item.name, [str(dim) for dim in item.shape or ()]) for item in model.graph.outputs] == [
        ("y", ["batch", "4"])
    ]
    assert logging.getLogger("torch.onnx").level == level
