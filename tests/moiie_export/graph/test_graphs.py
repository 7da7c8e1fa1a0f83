"""Facts every exported graph must keep: its contract with the runtime, where its weights lie, what it may not contain."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from moiie_export.graph.rewriting import ORIGIN
from moiie_export.ops.op import OPSET

GRAPHS = ("vision_encoder", "decoder_prefill", "decoder_decode")
DECODERS = GRAPHS[1:]
WEIGHTS = "weights.safetensors"
KINDS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int64"}
INLINE_LIMIT = 1024
"""Bytes of a tensor inside a graph; the larger ones are weights and lie outside."""

# op -> inputs that may be a parameter; through these a weight is read as it lies in the file
READERS = {
    ("Gemm", 1),
    ("Gemm", 2),
    ("Conv", 1),
    ("Conv", 2),
    ("Add", 1),
    ("LayerNormalization", 1),
    ("LayerNormalization", 2),
    ("RMSNormalization", 1),
}

# model type -> the authors' modules in the order of our expert ids, where they are not experts.0, experts.1, ...
MODULES: dict[str, list[str]] = {
    "bunny-phi3": [],
    "bunny-phi3-m": ["vision_expert", "language_expert"],
    "bunny-mm-phi3-moe": [*(f"vis_experts.{e}" for e in range(3)), *(f"lan_experts.{e}" for e in range(4))],
}

Signature = list[tuple[str, str, list[Any]]]


def signature(values: Any) -> Signature:
    described = []
    for value in values:
        kind = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        described.append((value.name, KINDS[kind.elem_type], dims))
    return described


def contract(manifest: dict[str, Any], name: str) -> tuple[Signature, Signature]:
    """Inputs and outputs that the runtime relies on, from the manifest's model alone."""
    model, tokens, side = manifest["model"], manifest["tokens"]["image_tokens"], manifest["processor"]["image_size"]
    hidden, layers, moe = model["hidden_size"], range(model["num_hidden_layers"]), model["moe"]
    if name == "vision_encoder":
        pixels: Signature = [("pixel_values", "float32", ["images", 3, side, side])]
        return pixels, [("image_features", "float32", ["images", tokens, hidden])]
    buffer = ["batch", model["num_key_value_heads"], manifest["kv_cache"]["capacity"], model["head_dim"]]
    prefill = name == "decoder_prefill"
    inputs: Signature = [("inputs_embeds", "float32", ["batch", "sequence" if prefill else 1, hidden])]
    inputs += [("token_modality", "int32", ["batch", "sequence"])] if prefill else []
    inputs += [("past_lengths", "int64", ["batch"])]
    inputs += [("logits_to_keep", "int64", ["batch", "kept"])] if prefill else []
    inputs += [(f"past_key_values.{i}.{kind}", "float32", buffer) for i in layers for kind in ("key", "value")]
    outputs: Signature = [("logits", "float32", ["batch", "kept" if prefill else 1, model["vocab_size"]])]
    outputs += [(f"present.{i}.{kind}", "float32", buffer) for i in layers for kind in ("key", "value")]
    rows = "batch*sequence" if prefill else "batch"
    for layer in moe["layers"] if moe else ():
        outputs.append((f"expert_ids.{layer}", "int32", [rows, moe["top_k"]]))
        outputs.append((f"expert_weights.{layer}", "float32", [rows, moe["top_k"]]))
        outputs += [(f"router_logits.{layer}", "float32", [rows, moe["num_experts"]])] if moe["routed"] else []
    return inputs, outputs


@pytest.mark.parametrize("name", GRAPHS)
def test_inputs_and_outputs_are_the_contract(bundle: Any, name: str) -> None:
    graph = bundle.graphs[name].model.graph
    inputs, outputs = contract(bundle.manifest, name)
    assert signature(graph.input) == inputs
    assert signature(graph.output) == outputs
    described = bundle.manifest["components"][name]
    for key, wanted in (("inputs", inputs), ("outputs", outputs)):
        assert [(item["name"], item["dtype"], item["shape"]) for item in described[key]] == wanted


@pytest.mark.parametrize("name", GRAPHS)
def test_the_full_check_of_onnx_passes(bundle: Any, name: str) -> None:
    onnx.checker.check_model(str(bundle.graphs[name].path), full_check=True)
    model = bundle.graphs[name].model
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, "moiie": 1}
    assert model.ir_version == 10
    assert (model.producer_name, model.producer_version, model.graph.name) == ("moiie-export", "", name)


@pytest.mark.parametrize("name", DECODERS)
def test_custom_nodes_are_as_many_as_layers(bundle: Any, name: str) -> None:
    model = bundle.manifest["model"]
    moe = model["moe"]
    sparse = len(moe["layers"]) if moe else 0
    routed = sparse if moe and moe["routed"] else 0
    counts = Counter(node.op_type for node in bundle.graphs[name].model.graph.node if node.domain == "moiie")
    wanted = {"CachedAttention": model["num_hidden_layers"], "ExpertDispatch": sparse}
    wanted |= {"TopKRoute": routed, "ModalityRouter": routed}
    assert counts == Counter({op: count for op, count in wanted.items() if count})
    listed = {
        op.removeprefix("moiie::"): n
        for op, n in bundle.manifest["components"][name]["op_counts"].items()
        if "::" in op
    }
    assert listed == dict(counts)
    assert not [node for node in bundle.graphs["vision_encoder"].model.graph.node if node.domain]


@pytest.mark.parametrize("name", DECODERS)
def test_attributes_of_custom_nodes_are_the_models_numbers(bundle: Any, name: str) -> None:
    model, moe = bundle.manifest["model"], bundle.manifest["model"]["moe"]
    window = 0 if model["sliding_window"] is None else model["sliding_window"] + 1
    reachable: list[int] = []
    expected: dict[str, Any] = {
        "CachedAttention": {"num_key_value_heads": model["num_key_value_heads"], "local_window_size": window}
    }
    if moe:
        groups = moe["expert_groups"]
        reachable = groups["language"] if name == "decoder_decode" else sorted({*groups["language"], *groups["vision"]})
        expected["ExpertDispatch"] = {"experts": reachable}
        expected["TopKRoute"] = {"top_k": moe["top_k"]}
        gates = {f"{modality}_experts": ids for modality, ids in groups.items()}
        expected["ModalityRouter"] = {**gates, "num_experts": moe["num_experts"]}
    for node in bundle.graphs[name].model.graph.node:
        if node.domain:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            assert attributes == expected[node.op_type]
        if node.op_type == "ExpertDispatch":
            layer = node.input[3].split(".experts.")[0]
            banks = [f"{layer}.experts.{e}.{kind}_proj" for kind in ("gate_up", "down") for e in reachable]
            assert list(node.input)[3:] == banks


@pytest.mark.parametrize("name", GRAPHS)
def test_every_custom_node_has_a_body_and_every_body_a_node(bundle: Any, name: str) -> None:
    graph = bundle.graphs[name]
    called = {(node.domain, node.op_type, node.overload) for node in graph.model.graph.node if node.domain}
    assert called == set(graph.functions)
    for function in graph.model.functions:
        assert {node.domain for node in function.node} == {""}
        assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", OPSET)]


@pytest.mark.parametrize("name", GRAPHS)
def test_no_control_flow_no_sequences_no_training_ops(bundle: Any, name: str) -> None:
    forbidden = {"If", "Loop", "Scan", "Identity", "Dropout", "GridSample"}
    graph = bundle.graphs[name]
    found = {node.op_type for node in graph.nodes() if node.op_type in forbidden or "Sequence" in node.op_type}
    assert found <= {"Identity"}
    in_bodies = sum(node.op_type == "Identity" for function in graph.model.functions for node in function.node)
    assert sum(node.op_type == "Identity" for node in graph.nodes()) == in_bodies


@pytest.mark.parametrize("name", GRAPHS)
def test_parameters_lie_in_the_weights_file_and_are_its_bytes(bundle: Any, name: str) -> None:
    """Each initialiser's offset and length cut exactly the tensor (or the slice of a stack) of that name."""
    graph, blob = bundle.graphs[name], (bundle.path / "onnx" / WEIGHTS).read_bytes()
    used = bundle.manifest["components"][name]["weights"]
    assert set(used) == set(graph.external)
    initialisers = {item.name: item for item in graph.model.graph.initializer}
    assert graph.external
    for parameter, place in graph.external.items():
        assert place["location"] == WEIGHTS
        view = weight_view(bundle, parameter)
        item = initialisers[parameter]
        assert (item.data_type, tuple(item.dims)) == (onnx.TensorProto.FLOAT, view.shape)
        start, length = int(place["offset"]), int(place["length"])
        assert start % 4 == 0
        assert blob[start : start + length] == view.tobytes()


def weight_view(bundle: Any, parameter: str) -> np.ndarray:
    """A parameter in the weights file: a tensor of its name, or a row of the stack of its expert layer."""
    if parameter in bundle.weights:
        return np.asarray(bundle.weights[parameter])
    layer, expert, kind = parameter.rsplit(".", 2)
    groups = bundle.manifest["model"]["moe"]["expert_groups"]
    reachable = sorted(set(groups["vision"]) | set(groups["language"]))
    return np.asarray(bundle.weights[f"{layer}.{kind}"][reachable.index(int(expert))])


def test_experts_of_the_graphs_are_the_experts_of_the_checkpoint(bundle: Any) -> None:
    """Not only some slice of the stack: expert e of the router's table is expert e of the authors' list."""
    case = Path(__file__).parents[2] / "golden" / bundle.path.name
    theirs = {
        name: value for file in (case / "checkpoint").glob("*.safetensors") for name, value in load_file(file).items()
    }
    blob = (bundle.path / "onnx" / WEIGHTS).read_bytes()
    places = bundle.graphs["decoder_prefill"].external
    modules = MODULES.get(bundle.manifest["model"]["model_type"], [f"experts.{e}" for e in range(4)])
    for expert, module in enumerate(modules):
        prefix = f"model.layers.1.mlp.{module}."
        halves = [theirs.get(f"{prefix}{half}_proj.weight") for half in ("gate", "up")]
        fused = theirs.get(f"{prefix}gate_up_proj.weight")
        expected = {
            "gate_up_proj": fused if fused is not None else np.concatenate(halves),
            "down_proj": theirs[f"{prefix}down_proj.weight"],
        }
        for kind, value in expected.items():
            place = places[f"decoder.layers.1.mlp.experts.{expert}.{kind}"]
            start, length = int(place["offset"]), int(place["length"])
            assert blob[start : start + length] == value.tobytes()


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_cuts_gathers_or_turns_a_weight(bundle: Any, name: str) -> None:
    """ONNX Runtime folds such nodes into copies in memory; also inside function bodies (design.md 4)."""
    graph = bundle.graphs[name]
    found: set[tuple[str, int]] = set()
    for node in graph.model.graph.node:
        for index, value in enumerate(node.input):
            if value in graph.external:
                found |= readers(graph, node, index)
    assert found
    assert found <= READERS


def readers(graph: Any, node: onnx.NodeProto, index: int) -> set[tuple[str, int]]:
    """The standard ops that read a node's input, looking into the body of a custom one."""
    body = graph.body(node)
    if body is None:
        assert not node.domain
        return {(node.op_type, index)}
    name = body.input[index]
    return {
        use
        for inner in body.node
        for i, value in enumerate(inner.input)
        if value == name
        for use in readers(graph, inner, i)
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_no_large_tensor_lies_in_the_graph(bundle: Any, name: str) -> None:
    sizes = {where: value.nbytes for where, value in bundle.graphs[name].inline()}
    assert max(sizes.values()) <= INLINE_LIMIT, max(sizes, key=lambda where: sizes[where])


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_of_the_tracing_machine_is_in_the_file(bundle: Any, name: str) -> None:
    content = bundle.graphs[name].path.read_bytes()
    root = str(Path(__file__).parents[3]).encode()
    for trace in (
        root,
        b"site-packages",
        b".py",
        b"/home/",
        b"/usr/",
        b"/tmp/",
        b"Traceback",
        b"aten.",
        b"pkg.",
        b"pytorch",
    ):
        assert trace not in content, trace
    model = bundle.graphs[name].model
    assert not model.metadata_props
    assert not model.graph.doc_string
    for node in bundle.graphs[name].nodes():
        assert {each.key for each in node.metadata_props} <= {ORIGIN}
        assert not node.doc_string


def test_the_decode_graph_holds_nothing_of_vision(bundle: Any) -> None:
    """Decode tokens are language: no vision expert, no vision gate, no modality (spec 9.1)."""
    graph, moe = bundle.graphs["decoder_decode"], bundle.manifest["model"]["moe"]
    assert "token_modality" not in {value.name for value in graph.model.graph.input}
    assert not [
        name for name in graph.external if "gate_vis" in name or name.startswith(("vision_encoder", "embed_tokens"))
    ]
    prefill = set(bundle.graphs["decoder_prefill"].external)
    if moe is None:
        assert set(graph.external) == prefill
        return
    language = set(moe["expert_groups"]["language"])
    assert {int(name.split(".")[-2]) for name in graph.external if ".experts." in name} == language
    reachable = language | set(moe["expert_groups"]["vision"])
    assert {int(name.split(".")[-2]) for name in prefill if ".experts." in name} == reachable
    left_out = prefill - set(graph.external)
    assert all(".experts." in name or ".gate_vis." in name for name in left_out)
    assert bool(left_out) is (reachable != language)


def test_every_parameter_is_in_some_graph_or_on_the_host(bundle: Any) -> None:
    used = {parameter for graph in bundle.graphs.values() for parameter in graph.external} | {"embed_tokens.weight"}
    stacks = {
        parameter.rsplit(".", 2)[0] + "." + parameter.rsplit(".", 1)[1]
        for parameter in used
        if ".experts." in parameter
    }
    assert {name for name in used if ".experts." not in name} | stacks == set(bundle.weights)
    assert "embed_tokens.weight" not in {name for graph in bundle.graphs.values() for name in graph.external}


def test_residual_streams_can_be_found_by_name(bundle: Any) -> None:
    """Parity reads them; they are values of the graphs though not outputs."""
    layers = bundle.manifest["model"]["num_hidden_layers"]
    for name in DECODERS:
        graph = bundle.graphs[name].model.graph
        written = {value for node in graph.node for value in node.output}
        assert {f"hidden.{layer}" for layer in range(layers)} <= written
        assert not {value.name for value in graph.output} & {f"hidden.{layer}" for layer in range(layers)}
    vision = bundle.graphs["vision_encoder"].model.graph
    assert "vision_features" in {value for node in vision.node for value in node.output}
