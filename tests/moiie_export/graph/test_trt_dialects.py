"""TensorRT dialects: they compute what the portable graph computes, with nothing in them that a parser would not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moiie_export.graph.trt_rules import TRT10_OPS
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile
from tests.exports import SMALLEST, exported, exported_mome
from tests.trt_graphs import DTYPES, dialect_feeds, feeds, lowered, target
from tests.trt_reference import run_dialect

HALF = ir.DataType.FLOAT16
DIALECTS = [("rtx", "required"), ("rtx", "off"), ("server", "optional"), ("orin", "required"), ("orin", "off")]
BOUNDS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}


@pytest.fixture(scope="module")
def bundle() -> Path:
    """One sparse layer, 64 tokens of context, less than its window."""
    return exported(SMALLEST).bundle


@pytest.fixture(scope="module")
def portable(bundle: Path) -> Callable[[str], dict[str, Any]]:
    """Component -> outputs of the bundle's own graph."""

    def run(component: str) -> dict[str, Any]:
        with OnnxRuntimeSession(bundle / "onnx" / f"{component}.onnx", threads=1) as session:
            return dict(session.run(feeds(bundle, component)))

    return run


def error(found: Any, wanted: Any) -> float:
    """Largest difference of finite numbers; what is not finite has to be the same."""
    finite = np.isfinite(wanted)
    assert (np.isfinite(found) == finite).all()
    difference = np.abs(found.astype(np.float64)[finite] - wanted[finite])
    return float(difference.max() / max(1.0, np.abs(wanted[finite]).max()))


def compare(bundle: Path, component: str, wanted: Any, made: Any, folder: Path) -> dict[str, float]:
    got = run_dialect(made.save(folder), dialect_feeds(made, feeds(bundle, component)))
    assert set(got) == set(wanted)
    return {name: error(got[name], value) for name, value in wanted.items()}


@pytest.mark.parametrize(("name", "plugins"), DIALECTS)
@pytest.mark.parametrize("component", ["decoder_prefill", "decoder_decode", "vision_encoder"])
def test_dialects_compute_the_portable_graph(
    bundle: Path, portable: Any, tmp_path: Path, component: str, name: str, plugins: str
) -> None:
    wanted = portable(component)
    for banks in ("inputs", "constants") if component == "decoder_prefill" else ("inputs",):
        made = lowered(bundle, component, target(name, plugins=plugins, banks=banks, precision="float32"))
        errors = compare(bundle, component, wanted, made, tmp_path)
        assert max(errors.values()) < BOUNDS["float32"], errors


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_stays_near(bundle: Path, portable: Any, tmp_path: Path, precision: str) -> None:
    made = lowered(bundle, "decoder_prefill", target("rtx", plugins="required", precision=precision))
    assert {str(value.dtype) for value in made.model.graph.inputs} == {precision.upper(), "INT32", "INT64"}
    outputs = {str(value.name): str(value.dtype) for value in made.model.graph.outputs}
    assert outputs["logits"] == "FLOAT"
    assert outputs["present.0.key"] == precision.upper()
    if precision == "float16":  # numpy's reference ops have no bfloat16
        errors = compare(bundle, "decoder_prefill", portable("decoder_prefill"), made, tmp_path)
        assert 0 < max(errors.values()) < BOUNDS[precision], errors


def test_a_window_within_the_context_takes_a_mask(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    windowed = golden_bundle("moiie_phi3")
    component = "decoder_decode"
    given = feeds(windowed, component) | {"past_lengths": np.array([2500], np.int64)}
    with OnnxRuntimeSession(windowed / "onnx" / f"{component}.onnx", threads=1) as session:
        wanted = session.run(given)["logits"]
    for name, kind in (("rtx", "TRT_Attention"), ("orin", "DecodeAttention")):
        made = lowered(windowed, component, target(name, plugins="required", precision="float32"))
        assert made.context.attention == ("mask" if name == "rtx" else "plugin")
        assert len(made.nodes(kind)) == 4
        got = run_dialect(made.save(tmp_path), dialect_feeds(made, given))["logits"]
        assert error(got, wanted) < BOUNDS["float32"]
    attributes = lowered(windowed, component, target("rtx")).nodes("TRT_Attention")[0].attributes
    assert attributes["causal_kind"].as_string() == "none"


def test_without_a_window_attention_is_causal_from_the_newest_key(bundle: Path) -> None:
    made = lowered(bundle, "decoder_prefill", target("rtx"))
    (attention,) = made.nodes("TRT_Attention")
    assert made.context.attention == attention.attributes["causal_kind"].as_string() == "lower_right"
    assert attention.inputs[3] is None
    assert attention.inputs[5] is not None


@pytest.mark.parametrize("name", ["rtx", "orin"])
def test_the_query_is_scaled_and_the_key_is_not(bundle: Path, name: str) -> None:
    made = lowered(bundle, "decoder_prefill", target(name, precision="float32"))
    factors = [
        node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        for node in made.nodes("Mul")
        if node.name is not None and node.name.endswith("/scale")
    ]
    assert factors == [pytest.approx(1 / np.sqrt(8))]
    keys = {"TRT_KVCacheUpdate", "KVCacheUpdate", "ScatterND"}
    updates = [node for node in made.model.graph if node.op_type in keys]
    assert [node.inputs[-1 if node.op_type == "ScatterND" else 1].producer().op_type for node in updates] == [  # type: ignore[union-attr]
        "RotaryEmbedding" if name == "rtx" else "Concat",
        "Slice",
    ]


@pytest.mark.parametrize("component", ["decoder_prefill", "decoder_decode", "vision_encoder"])
def test_trt10_has_standard_ops_only(bundle: Path, tmp_path: Path, component: str) -> None:
    made = lowered(bundle, component, target("orin", plugins="off"))
    assert {domain for domain, _ in made.ops()} == {""}
    assert {kind for _, kind in made.ops()} <= TRT10_OPS
    model = onnx.load(made.save(tmp_path), load_external_data=False)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert model.ir_version == 10
    onnx.checker.check_model(str(tmp_path / f"{component}.onnx"), full_check=True)


def test_native_dialects_hold_native_layers(bundle: Path) -> None:
    for name in ("rtx", "server"):
        made = lowered(bundle, "decoder_decode", target(name, plugins="required"))
        assert {"TRT_KVCacheUpdate", "TRT_Attention", "RotaryEmbedding", "RMSNormalization"} <= {
            k for _, k in made.ops()
        }
        assert {kind for domain, kind in made.ops() if domain == "moiie"} == {"ExpertDispatch"}
        assert not made.model.functions
        assert set(made.context.aliases) == {"present.0.key", "present.0.value"}


def test_plugin_nodes_ask_for_the_plugin(bundle: Path) -> None:
    for plugins, functions in (("required", 0), ("optional", 1)):
        made = lowered(bundle, "decoder_prefill", target("rtx", plugins=plugins))
        nodes = made.nodes("ExpertDispatch")
        assert len(nodes) == 2
        assert all(node.attributes["plugin_namespace"].as_string() == "" for node in nodes)
        assert len(made.model.functions) == functions
    assert not lowered(bundle, "decoder_prefill", target("rtx", plugins="off")).nodes("ExpertDispatch")


def test_banks_part_what_leaves_memory_after_the_prompt(bundle: Path) -> None:
    prefill = lowered(bundle, "decoder_prefill", target("rtx", plugins="required"))
    decode = lowered(bundle, "decoder_decode", target("rtx", plugins="required"))
    assert {bank.name: bank.experts for bank in prefill.context.banks} == {"language": (1, 2, 3), "vision": (0,)}
    assert [(bank.name, bank.experts) for bank in decode.context.banks] == [("language", (1, 2, 3))]
    shapes = {str(value.name): list(value.shape or ()) for value in decode.model.graph.inputs}
    assert shapes["experts.0.language.gate_up"] == [3, 96, 32]
    assert shapes["experts.0.language.down"] == [3, 32, 48]
    stored = np.asarray(TensorFile(bundle / "onnx" / "weights.safetensors")["decoder.layers.0.mlp.experts.down_proj"])
    tensors = prefill.context.banks[0].tensors["experts.0.language.down"]
    np.testing.assert_array_equal(np.stack([each.numpy() for each in tensors]), stored[1:])


def test_routing_and_angles_stay_float32(bundle: Path) -> None:
    made = lowered(bundle, "decoder_prefill", target("rtx", plugins="required"))
    for kind in ("Softmax", "TopK", "Cos", "Sin"):
        assert made.types(kind, 0) == {ir.DataType.FLOAT}, kind
    assert made.types("ExpertDispatch", 2) == {ir.DataType.FLOAT}
    assert made.types("ExpertDispatch", 0) == made.types("ExpertDispatch", 3) == {HALF}
    assert made.types("RotaryEmbedding", 1) == {HALF}


def test_islands_keep_what_flows_through_them_in_float32(bundle: Path) -> None:
    island = "decoder.layers.0.self_attn.o_proj.weight"
    plain = lowered(bundle, "decoder_decode", target("rtx", plugins="required"))
    made = lowered(bundle, "decoder_decode", target("rtx", plugins="required"), (island,))
    assert plain.types("Gemm", 1) == {HALF, ir.DataType.FLOAT}  # the router's gates are float32 always
    gemm = next(node for node in made.nodes("Gemm") if str(node.inputs[1].name).startswith(island))  # type: ignore[union-attr]
    assert gemm.outputs[0].dtype == ir.DataType.FLOAT
    (added, *_) = [use.node for use in gemm.outputs[0].uses()]
    assert added.op_type == "Add"
    assert added.outputs[0].dtype == ir.DataType.FLOAT
    norms = [use.node for use in added.outputs[0].uses() if use.node.op_type == "RMSNormalization"]
    assert len(norms) == 1


def test_an_island_among_experts_is_refused(bundle: Path) -> None:
    with pytest.raises(MoiieError, match="is an island, and experts compute in float16"):
        lowered(bundle, "decoder_decode", target("rtx"), ("decoder.layers.0.mlp.experts.2.down_proj",))


def test_points_of_deformable_samples_are_never_half() -> None:
    mome = exported_mome(640).bundle
    for name in ("rtx", "orin"):
        made = lowered(mome, "vision_dino", target(name))
        floors = made.nodes("Floor")
        assert len(floors) == 6
        assert made.types("Floor", 0) == {ir.DataType.FLOAT}
        assert "GridSample" not in {kind for _, kind in made.ops()}
        value = floors[0].inputs[0]
        while value is not None and (node := value.producer()) is not None and node.op_type not in ("Gemm", "Cast"):
            assert value.dtype == ir.DataType.FLOAT, node
            value = next((each for each in node.inputs if each is not None and each.producer() is not None), None)


def test_unknown_attributes_and_ops_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moiie_export.graph import trt_attention

    monkeypatch.setitem(trt_attention.NATIVE, "is_causal", 1)
    with pytest.raises(MoiieError, match="attribute is_causal is not one that the parser reads"):
        lowered(bundle, "decoder_decode", target("rtx"))
    monkeypatch.undo()
    monkeypatch.setattr("moiie_export.graph.trt_rules.TRT10_OPS", TRT10_OPS - {"ScatterND"})
    with pytest.raises(MoiieError, match="dialect trt10 has no such op"):
        lowered(bundle, "decoder_decode", target("orin", plugins="off"))


def test_inputs_have_the_types_a_host_can_make(bundle: Path) -> None:
    for component in ("decoder_prefill", "vision_encoder"):
        made = lowered(bundle, component, target("rtx"))
        kinds = {value.dtype for value in made.model.graph.inputs}
        assert kinds <= {HALF, ir.DataType.INT32, ir.DataType.INT64}
    assert set(DTYPES) >= {"float16", "int32", "int64"}
