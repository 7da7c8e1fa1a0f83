"""Experts without the plugin library: what ONNX Runtime makes of the dialects' graphs is the layer of the stored weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moiie_export.graph.rewriting import origin
from moiie_export.graph.trt_context import EXACT, TrtContext
from moiie_export.graph.trt_precision import convert_precision
from moiie_export.ops import DOMAIN
from moiie_export.ops.expert_dispatch import expert_dispatch
from moiie_export.ops.op import OPSET
from moiie_export.quantize.scheme import Scheme
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from tests.exports import FUSIBLE, MIXED_RULES, exported
from tests.moiie_export.builders.test_banks import EXPERTS, FORMATS, HIDDEN, LANGUAGE, LAYERS, SHAPES, Stored, ident
from tests.trt_graphs import dialect_feeds, lowered, target
from tests.trt_graphs import feeds as graph_feeds
from tests.trt_reference import run_dialect

Array = np.ndarray[Any, Any]
TOKENS = 9
SOME = [None, Scheme("fp8"), Scheme("int8", 32), Scheme("int4", 128)]


def routes() -> dict[str, Array]:
    """Expert ids [T, 2]: as a router gives them, and ragged ones."""
    mixed = np.random.default_rng(3).permuted(np.tile(EXPERTS, (TOKENS, 1)), axis=1)[:, :2]
    split = np.tile([[0, 3], [3, 0], [0, 3]], (TOKENS // 3, 1))
    return {
        "mixed": mixed,
        "one token": mixed[:1],
        "experts without a token": split,
        "all on one": np.tile([[2, 1]], (TOKENS, 1)),
        "of another bank alone": np.tile([[0, 0]], (TOKENS, 1)),
    }


def feeds(ids: Array) -> dict[str, Array]:
    random = np.random.default_rng(len(ids))
    weights = random.random(ids.shape).astype(np.float32)
    if (ids[:, 0] == ids[:, 1]).all():  # a second route to nowhere
        ids = np.stack([ids[:, 0], np.full(len(ids), 77)], axis=1)
    hidden = random.standard_normal((len(ids), HIDDEN)).astype(np.float32)
    return {"hidden": hidden, "expert_ids": ids.astype(np.int32), "expert_weights": weights}


def expected(stored: Stored, given: dict[str, Array]) -> Array:
    """Both layers, one behind the other, on what the stored numbers stand for."""
    hidden = torch.from_numpy(given["hidden"].astype(np.float64))
    ids, weights = torch.from_numpy(given["expert_ids"]), torch.from_numpy(given["expert_weights"].astype(np.float64))
    for layer in LAYERS:
        banks = [list(torch.from_numpy(stored.values[layer, kind].astype(np.float64))) for kind in SHAPES]
        hidden = expert_dispatch(hidden, ids, weights, banks[0], banks[1], list(EXPERTS))
    return hidden.numpy()


def banks(stored: Stored, context: TrtContext) -> dict[str, Any]:
    """The file that the builder writes, as the runtime binds it."""
    file = stored.write_banks([context])
    return {
        name: np.array(file.bits(name)).view(ml_dtypes.float8_e4m3fn)
        if info.dtype == "F8_E4M3"
        else np.array(file[name])
        for name, info in file.header.items()
    }


def session(stored: Stored) -> onnxruntime.InferenceSession:
    path = stored.folder / "lowered.onnx"
    ir.save(stored.model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bound(values: dict[str, Any]) -> dict[str, Any]:
    """ONNX Runtime takes 8-bit floats as values of its own alone."""
    return {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint8), ir.DataType.FLOAT8E4M3FN)
        if value.dtype == ml_dtypes.float8_e4m3fn
        else onnxruntime.OrtValue.ortvalue_from_numpy(value)
        for name, value in values.items()
    }


def typed(stored: Stored, values: dict[str, Array]) -> dict[str, Array]:
    """Activations in the types that the graph asks for."""
    dtypes = {str(value.name): value.dtype for value in stored.model.graph.inputs}
    return {name: value.astype(dtypes[name].numpy()) for name, value in values.items()}  # type: ignore[union-attr]


def run(stored: Stored, context: TrtContext, rows: dict[str, dict[str, Array]]) -> Iterator[Array]:
    """The layers' output for each of the routes."""
    given = bound(banks(stored, context)) if context.banks else {}
    opened = session(stored)
    for activations in rows.values():
        yield opened.run_with_ort_values(None, bound(typed(stored, activations)) | given)[0].numpy()


@pytest.mark.parametrize("scheme", FORMATS, ids=ident)
def test_every_token_gets_what_its_experts_make_of_it(tmp_path: Path, scheme: Scheme | None) -> None:
    """As inputs and as constants; the dialects' passes are the same, but for the opset of trt10."""
    stored = Stored(tmp_path, scheme)
    rows = {name: feeds(ids) for name, ids in routes().items()}
    wanted = {name: expected(stored, each) for name, each in rows.items()}
    for name in ("rtx", "orin") if scheme in SOME else ("rtx",):
        for place in ("inputs", "constants"):
            off = target(name, plugins="off", banks=place, precision="float32")
            context = stored.context("decoder_prefill", off)
            assert {node.domain for node in stored.model.graph} == {""}
            for route, found in zip(rows, run(stored, context, rows), strict=True):
                scale = max(1.0, float(np.abs(wanted[route]).max()))
                np.testing.assert_allclose(found, wanted[route], atol=1e-5 * scale, err_msg=f"{name} {place} {route}")


@pytest.mark.parametrize("scheme", SOME, ids=ident)
def test_half_precision_is_that_of_the_products_alone(tmp_path: Path, scheme: Scheme | None) -> None:
    stored = Stored(tmp_path, scheme)
    rows = {"mixed": feeds(routes()["mixed"])}
    (wanted,) = (expected(stored, each) for each in rows.values())
    for precision in ("float16", "bfloat16"):
        for place in ("inputs", "constants"):
            context = stored.context("decoder_prefill", target("rtx", plugins="off", banks=place, precision=precision))
            products = [node for node in stored.model.graph if node.op_type == "MatMul"]
            for node in products:
                weights = origin(node.inputs[1], ("Transpose", "Reshape"))
                assert weights is not None
                assert str(weights.dtype) == precision.upper()
            assert len(products) == len(LAYERS) * 2 * (2 if place == "inputs" else 1), "two a bank"
            if precision == "float16":  # ONNX Runtime has no products of bfloat16 on a CPU
                (found,) = run(stored, context, rows)
                assert 0 < np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("scheme", SOME, ids=ident)
def test_plugins_and_the_dense_body_bind_the_same_inputs(tmp_path: Path, scheme: Scheme | None) -> None:
    stored = Stored(tmp_path, scheme)
    for precision in ("float16", "bfloat16"):
        seen = []
        for plugins in ("required", "optional", "off"):
            context = stored.context("decoder_prefill", target("rtx", plugins=plugins, precision=precision))
            tensors = [(bank.layer, bank.name, bank.experts, sorted(bank.tensors)) for bank in context.banks]
            seen.append((context.inputs, tensors))
            scales = {each["dtype"] for name, each in context.inputs.items() if name.endswith("_scales")}
            assert scales == (set() if scheme is None else {"float16" if scheme.grouped else "float32"})
        assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("scheme", SOME[1:], ids=ident)
@pytest.mark.parametrize("place", ["inputs", "constants"])
def test_copies_of_a_layer_wait_for_its_routes(tmp_path: Path, scheme: Scheme, place: Any) -> None:
    """TensorRT would make the copies of all layers first. It makes none of int4 constants."""
    stored = Stored(tmp_path, scheme)
    stored.context("decoder_prefill", target("rtx", plugins="off", banks=place))
    products = [node for node in stored.model.graph if node.op_type == "MatMul"]
    for node in products:
        assert ("expert_ids" in ancestors(node.inputs[1])) == (place == "inputs" or scheme.bits == 8)
    assert products
    kinds = {node.op_type for node in stored.model.graph}
    assert ("DequantizeLinear" in kinds) == (place == "constants" or not scheme.grouped)


def ancestors(value: ir.Value | None) -> set[str]:
    """Names of what a value is made of."""
    found, wanted = set(), [value]
    while wanted:
        value = wanted.pop()
        if value is not None and value.name not in found:
            found.add(str(value.name))
            made = value.producer()
            wanted += [] if made is None else made.inputs
    return found


def test_an_expert_that_overflows_on_the_tokens_of_others_adds_nothing(tmp_path: Path) -> None:
    """Vision experts never saw what a language token holds. One token is routed to them, which is zero."""
    stored = Stored(tmp_path, Scheme("int8", 64))
    context = stored.context("decoder_prefill", target("rtx", plugins="off", precision="float32"))
    given = banks(stored, context)
    for name in given:
        if ".vision." in name and name.endswith("scales"):
            given[name] = np.full_like(given[name], 6e4)
    ids = routes()["mixed"] % len(LANGUAGE) + 1
    ids[0, 0] = 0
    activations = feeds(ids)
    activations["hidden"] *= np.where(np.arange(TOKENS) == 0, 0, 1e8)[:, None].astype(np.float32)
    (found,) = session(stored).run_with_ort_values(None, bound(activations | given))
    assert np.isfinite(found.numpy()).all()
    assert np.abs(found.numpy()).max() > 1e20


@pytest.mark.parametrize("op", ["ExpertDispatch", "QuantizedExpertDispatch", "Fp8ExpertDispatch"])
def test_experts_compute_in_the_targets_precision_on_float32_rows(op: str) -> None:
    """An island leaves such rows."""
    kinds = {
        "hidden": ir.DataType.FLOAT,
        "ids": ir.DataType.INT32,
        "weights": ir.DataType.FLOAT,
        "bank": ir.DataType.INT8,
    }
    given = [ir.Value(name=name, shape=ir.Shape([4, 4]), type=ir.TensorType(kind)) for name, kind in kinds.items()]
    for value in given:
        value.metadata_props[EXACT] = "1"
    node = ir.node(op, given, domain=DOMAIN, name="experts")
    out = node.outputs[0]
    out.name, out.shape, out.type = "out", ir.Shape([4, 4]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(given, [out], nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="g")
    convert_precision(ir.Model(graph, ir_version=10), TrtContext("decoder", target("rtx")))
    assert [str(value.dtype) for value in node.inputs if value is not None] == ["FLOAT16", "INT32", "FLOAT", "INT8"]
    assert out.dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("place", ["inputs", "constants"])
def test_a_dialects_graph_of_mixed_formats_computes_the_portable_one(tmp_path: Path, place: Any) -> None:
    """The vision expert in int8, the others in int4, with all that is around them."""
    bundle = exported({**FUSIBLE, "layers": 2}, "float32", 256, MIXED_RULES).bundle
    given = graph_feeds(bundle, "decoder_prefill")
    with OnnxRuntimeSession(bundle / "onnx" / "decoder_prefill.onnx", threads=1) as opened:
        wanted = opened.run(given)["logits"]
    for name in ("rtx", "orin"):
        made = lowered(bundle, "decoder_prefill", target(name, plugins="off", banks=place, precision="float32"))
        assert "moiie" not in {domain for domain, _ in made.ops()}
        found = run_dialect(made.save(tmp_path), dialect_feeds(made, given))["logits"]
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
