"""banks.safetensors, number by number: what a kernel reads there is what the bundle stores, in every format and phase.

Two layers of experts are stored as a bundle stores them, lowered, and written as the builder writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moiie_export.builders import tensorrt
from moiie_export.graph import passes
from moiie_export.graph.components import Component
from moiie_export.graph.passes import PassContext
from moiie_export.graph.trt import lower
from moiie_export.graph.trt_context import TrtContext
from moiie_export.ops.expert_dispatch import expert_dispatch
from moiie_export.ops.op import OPSET
from moiie_export.quantize.methods import quantizer
from moiie_export.quantize.packing import dequantize, restore, stored_arrays, stored_specs
from moiie_export.quantize.scheme import GROUP_SIZES, Scheme
from moiie_export.targets import Target
from moiie_export.weights import Part, Weight, WeightMap
from moiie_runtime.tensors import TensorFile, TensorWriter, read_header
from tests.plugins.experts import TOLERANCE, relative_error
from tests.plugins.interpreter import needs_triton, patch_language_once
from tests.trt_graphs import target

HIDDEN, INNER, LAYERS, EXPERTS, LANGUAGE = 256, 128, (1, 3), (0, 1, 2, 3), (1, 2, 3)
SHAPES = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
FORMATS = [None, Scheme("fp8"), *(Scheme(name, group) for name in ("int8", "int4") for group in GROUP_SIZES)]
FILE, BANKS = "weights.safetensors", "banks.safetensors"
ORIN = target("orin")


def ident(scheme: Scheme | None) -> str:
    return "float16" if scheme is None else f"{scheme.format}-{scheme.group_size}"


def stored_in(file: TensorFile, name: str) -> tuple[np.ndarray, str]:
    """A tensor, 8-bit floats as uint8, and its type as engine.json calls it."""
    if file.header[name].dtype == "F8_E4M3":
        return np.array(file.bits(name)), "float8_e4m3fn"
    return np.array(file[name]), str(file[name].dtype)


@dataclass
class Stored:
    """Experts of two layers in a weights file. `values`: (layer, kind) -> what is stored stands for [E, rows, columns]."""

    folder: Path
    scheme: Scheme | None
    values: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        arrays: dict[str, tuple[str, np.ndarray]] = {}
        for weight in self.weights:
            drawn = (random.standard_normal(weight.shape) / np.sqrt(weight.shape[-1])).astype(np.float32)
            key = (int(weight.name.split(".")[2]), weight.name.rpartition(".")[2])
            if self.scheme is None:
                arrays[weight.name] = ("F16", drawn.astype(np.float16))
                self.values[key] = arrays[weight.name][1].astype(np.float32)
                continue
            made = quantizer("rtn", self.scheme.format)(
                drawn.reshape(-1, drawn.shape[-1]), self.scheme, name=weight.name
            )
            parts = stored_arrays(made, self.scheme)
            for suffix, (kind, shape) in stored_specs(weight.shape, self.scheme).items():
                arrays[weight.name + suffix] = (kind, parts[suffix].reshape(shape))
            self.values[key] = restore(made, self.scheme).reshape(weight.shape)
        ordered = dict(sorted(arrays.items(), key=lambda item: item[1][0] != "F16"))
        specs = {name: (kind, array.shape) for name, (kind, array) in ordered.items()}
        with TensorWriter(self.folder / FILE, specs) as writer:
            for name, (_, array) in ordered.items():
                writer.write_elements(array, name)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """A stack a layer and kind, as in a bundle."""
        found = []
        for layer in LAYERS:
            for kind, shape in SHAPES.items():
                name = f"decoder.layers.{layer}.mlp.experts"
                parts = tuple(Part("checkpoint", f"{name}.{e}.{kind}", shape) for e in EXPERTS)
                views = {f"{name}.{e}.{kind}": e for e in EXPERTS}
                found.append(Weight(f"{name}.{kind}", (len(EXPERTS), *shape), parts, views=views))
        return tuple(found)

    def context(self, component: str, wanted: Target = ORIN) -> TrtContext:
        """The component lowered for a target; decode has the language experts alone."""
        experts = EXPERTS if component == "decoder_prefill" else LANGUAGE
        hidden, share = _value("hidden", ir.DataType.FLOAT, HIDDEN), _value("expert_weights", ir.DataType.FLOAT, 2)
        ids = _value("expert_ids", ir.DataType.INT32, 2)
        values, nodes, rows = [], [], hidden
        for layer in LAYERS:
            banks = [
                ir.Value(
                    name=f"decoder.layers.{layer}.mlp.experts.{e}.{kind}",
                    shape=ir.Shape(shape),
                    type=ir.TensorType(ir.DataType.FLOAT),
                )
                for kind, shape in SHAPES.items()
                for e in experts
            ]
            values += banks
            inputs = [rows, ids, share, *banks]
            node = ir.node(
                "ExpertDispatch", inputs, attributes={"experts": list(experts)}, domain="moiie", name=f"l{layer}"
            )
            node.outputs[0].name = f"mixed.{layer}"
            nodes.append(node)
            rows = node.outputs[0]
        rows.shape, rows.type = ir.Shape(["sequence", HIDDEN]), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [hidden, ids, share],
            [rows],
            nodes=nodes,
            initializers=values,
            opset_imports={"": OPSET, "moiie": 1},
            name="g",
        )
        model = ir.Model(graph, ir_version=10)
        schemes = {} if self.scheme is None else {weight.name: self.scheme for weight in self.weights}
        about = PassContext(
            Component("small", None, (), (), (), tuple),  # type: ignore[arg-type]
            WeightMap(self.weights, {}),
            read_header(self.folder / FILE),
            FILE,
            schemes,
        )
        for each in (passes.quantize_nodes, passes.attach_weights):
            each(model, about)
        path = self.folder / f"{component}.onnx"
        ir.save(model, path)
        context = TrtContext(component, wanted, dict.fromkeys(LAYERS, LANGUAGE))
        self.model = lower(path, context)
        context.inputs = {str(value.name): tensorrt._tensor(value) for value in self.model.graph.inputs}
        return context

    def write_banks(self, contexts: list[TrtContext]) -> TensorFile:
        """The file that the builder writes beside the engines."""
        nothing: Any = None
        tensorrt._Build(nothing, nothing, nothing, None, lambda *_: None)._banks(self.folder, contexts)
        return TensorFile(self.folder / BANKS)


def _value(name: str, dtype: ir.DataType, columns: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["sequence", columns]), type=ir.TensorType(dtype))


@pytest.mark.parametrize("scheme", FORMATS, ids=ident)
def test_every_expert_is_there_as_the_bundle_stores_it(tmp_path: Path, scheme: Scheme | None) -> None:
    stored = Stored(tmp_path, scheme)
    prefill, decode = stored.context("decoder_prefill"), stored.context("decoder_decode")
    file = stored.write_banks([prefill, decode])
    assert {(bank.layer, bank.name): bank.experts for bank in prefill.banks} == {
        (layer, name): experts for layer in LAYERS for name, experts in (("language", LANGUAGE), ("vision", (0,)))
    }
    assert {(bank.layer, bank.name) for bank in decode.banks} == {(layer, "language") for layer in LAYERS}
    assert set(file) == {name for bank in prefill.banks for name in bank.tensors}
    for context in (prefill, decode):
        for bank in context.banks:
            for kind in ("gate_up", "down"):
                name = f"experts.{bank.layer}.{bank.name}.{kind}"
                array, dtype = stored_in(file, name)
                assert list(array.shape) == context.inputs[name]["shape"]
                assert dtype == context.inputs[name]["dtype"]
                wanted = stored.values[bank.layer, f"{kind}_proj"][list(bank.experts)]
                if scheme is not None:
                    array = dequantize(array, np.asarray(file[f"{name}_scales"]), scheme)
                np.testing.assert_array_equal(array.astype(np.float32), wanted)


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "tokens"),
    [(None, 12), (Scheme("int8", 64), 2), (Scheme("int4", 128), 12), (Scheme("fp8"), 2), (Scheme("fp8"), 12)],
    ids=["float16 prefill", "int8 decode", "int4 prefill", "fp8 decode", "fp8 prefill"],
)
def test_the_kernel_computes_the_layer_from_these_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme | None, tokens: int
) -> None:
    """Each bank is a node of its own, and their results are added; in decode there is one bank."""
    from moiie_plugins.run import run

    patch_language_once(monkeypatch)
    stored = Stored(tmp_path, scheme)
    phase = "decoder_prefill" if tokens > 8 else "decoder_decode"
    context = stored.context(phase)
    file = stored.write_banks([context])
    random = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=random).half()
    experts = EXPERTS if phase == "decoder_prefill" else LANGUAGE
    scores = torch.rand(tokens, len(experts), generator=random)
    ids = torch.tensor(experts)[scores.topk(2).indices].to(torch.int32)
    shares = torch.rand(tokens, 2, generator=random)
    layer = LAYERS[-1]
    total = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for node in stored.model.graph:
        names = [str(value.name) for value in node.inputs[3:] if value is not None]
        if not names or not names[0].startswith(f"experts.{layer}."):
            continue
        given = {}
        for name in names:
            array, dtype = stored_in(file, name)
            given[name.rpartition(".")[2]] = torch.from_numpy(array).view(getattr(torch, dtype))
        attributes = {key: each.value for key, each in node.attributes.items() if not key.startswith("plugin")}
        tensors = {"hidden": hidden, "expert_ids": ids, "expert_weights": shares, **given}
        out = torch.full_like(hidden, float("nan"))
        kernels = run(node.op_type, tensors, out, attributes)
        assert len(kernels) == (4 if phase == "decoder_prefill" else 2)
        total += out.double()
    weights = [torch.from_numpy(stored.values[layer, kind]).double() for kind in SHAPES]
    expected = expert_dispatch(hidden.double(), ids, shares.double(), list(weights[0]), list(weights[1]), list(EXPERTS))
    assert relative_error(total, expected) <= 2 * TOLERANCE[torch.float16]
