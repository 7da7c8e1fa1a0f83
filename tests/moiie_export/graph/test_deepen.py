"""A graph made deep from a few layers is the graph that tracing all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from moiie_export.families import family_of
from moiie_export.graph import trace as tracing
from moiie_export.graph.deepen import SCOPES, Stack, deepen, find_stack, scopes
from moiie_export.graph.trace import _trace, trace
from moiie_export.model.load import empty_model
from moiie_export.source import ModelSource
from moiie_runtime.strict_files import read_json_object
from tests.mome_golden import MomeCase, mome_config

GOLDEN = Path(__file__).parents[2] / "golden"
CAPACITY = 32
kept_alive: list[ir.Model] = []
"""So that the next one lies at other addresses."""


def moiie(layers: int, period: int) -> Any:
    """A golden case's model with another depth; every `period`-th layer has experts."""
    with ModelSource.open(GOLDEN / "moiie_phi3" / "checkpoint") as source:
        config: Any = source.config
    return replace(
        config,
        text=replace(config.text, num_hidden_layers=layers),
        moe=replace(config.moe, layers=tuple(range(period - 1, layers, period))),
        vision=replace(config.vision, num_hidden_layers=layers, select_layer=-1),
    )


def mome(layers: int) -> Any:
    """The golden case's MoME with other depths."""
    case = MomeCase("end_to_end")
    config = mome_config(case.about, read_json_object(case.path / "llm" / "config.json", 1 << 20))
    experts = [replace(each, tower=replace(each.tower, num_hidden_layers=layers)) for each in config.experts]
    return replace(
        config,
        text=replace(config.text, num_hidden_layers=layers),
        experts=tuple(experts),
        sentence=replace(config.sentence, num_hidden_layers=layers),
        mole=replace(config.mole, layers=tuple(range(layers))),
    )


def component_of(config: Any, name: str) -> Any:
    return next(each for each in family_of(config).components(config, CAPACITY) if each.name == name)


def model_of(config: Any) -> Any:
    return empty_model(SimpleNamespace(config=config, weight_map=None))


def text_of(model: ir.Model) -> list[Any]:
    """All there is in a graph but for the names of inner values, which are counted."""
    graph = model.graph
    names = {value: value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    sizes = {str(value.name): "a buffer" for value in graph.inputs if str(value.name).startswith("past_")}
    nodes: list[Any] = []
    for node in graph:
        for value in node.outputs:
            names.setdefault(value, f"%{len(names)}")
        read = [None if value is None else names[value] for value in node.inputs]
        if node.op_type == "Shape":  # which of the buffers the exporter asks for the batch is its own affair
            read = [sizes.get(str(name), name) for name in read]
        attributes = sorted(
            (each.name, each.as_tensor().numpy().tolist() if each.type == ir.AttributeType.TENSOR else each.value)
            for each in node.attributes.values()
        )
        nodes.append((node.domain, node.op_type, read, [names[v] for v in node.outputs], attributes, scopes(node)))
    ends = [(each.name, str(each.shape), each.dtype) for each in (*graph.inputs, *graph.outputs)]
    parameters = sorted((name, str(value.shape)) for name, value in graph.initializers.items())
    return [*nodes, ends, parameters]


CASES = {
    "decode": (moiie(8, 2), "decoder_decode", Stack("decoder.layers", 8, 2)),
    "vision": (moiie(4, 1), "vision_encoder", Stack("vision_encoder.tower.layers", 4, 1)),
    "prefill": (mome(4), "decoder_prefill", Stack("decoder.layers", 4, 1)),
    "router": (mome(4), "router", Stack("router.sentence_encoder.layers", 4, 1)),
    "pix2struct": (mome(4), "vision_pix2struct", Stack("vision_pix2struct.tower.layers", 4, 1)),
}


@pytest.mark.parametrize(("config", "name", "stack"), CASES.values(), ids=CASES)
def test_it_is_the_graph_of_all_layers(config: Any, name: str, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    component, model = component_of(config, name), model_of(config)
    assert find_stack(component.module(model), component) == stack
    traced = []
    monkeypatch.setattr(tracing, "_trace", lambda *given: traced.append(_trace(*given)) or traced[-1])
    deep = text_of(trace(component, model))
    assert len(traced) == 1, "the first layers, once"
    assert deep == text_of(_trace(component, component.module(model_of(config)).eval()))


def test_it_is_the_same_every_time() -> None:
    """Sets of values are in the order of their addresses; the file must not be."""
    component = component_of(moiie(5, 1), "vision_encoder")
    kept = []
    for _ in range(3):
        model = trace(component, model_of(moiie(5, 1)))
        names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
        nodes = [(node.name, [value.name for value in node.outputs]) for node in model.graph]
        kept.append((list(model.graph.initializers), names, nodes))
        kept_alive.append(model)
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("layers", [(1, 3, 5), (1, 3, 5, 6), (0, 1, 2, 3, 4, 5, 6)], ids=str)
def test_layers_in_no_order_are_all_traced(layers: tuple[int, ...]) -> None:
    config = moiie(8, 2)
    config = replace(config, moe=replace(config.moe, layers=layers))
    component = component_of(config, "decoder_decode")
    assert find_stack(component.module(model_of(config)), component) is None


def test_a_layer_with_a_setting_of_its_own_is_seen() -> None:
    config = moiie(4, 1)
    component, model = component_of(config, "vision_encoder"), model_of(config)
    layers = component.module(model).get_submodule(component.layers)
    assert find_stack(component.module(model), component) is not None
    layers[2].self_attn.heads //= 2
    assert find_stack(component.module(model), component) is None


def test_few_layers_are_all_traced() -> None:
    for layers, period in ((3, 1), (6, 2), (7, 2)):
        component = component_of(moiie(layers, period), "decoder_decode")
        assert find_stack(component.module(model_of(moiie(layers, period))), component) is None


@pytest.fixture(scope="module")
def short() -> ir.Model:
    """The first three layers of four, traced."""
    component = component_of(moiie(4, 1), "vision_encoder")
    return _trace(component, component.module(model_of(moiie(3, 1))).eval())


def last(model: ir.Model, op: str) -> ir.Node:
    return [node for node in model.graph if node.op_type == op][-1]


def change_attribute(model: ir.Model) -> None:
    last(model, "LayerNormalization").attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


def change_constant(model: ir.Model) -> None:
    node = [node for node in model.graph if node.op_type == "Constant" and scopes(node)[-1].endswith("attn")][-1]
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor([7]))


def change_op(model: ir.Model) -> None:
    [node for node in model.graph if node.op_type == "Gelu"][2].op_type = "Tanh"


def swap_inputs(model: ir.Model) -> None:
    last(model, "Attention").replace_input_with(0, last(model, "Attention").inputs[1])


def share_a_parameter(model: ir.Model) -> None:
    first = next(node for node in model.graph if node.op_type == "LayerNormalization")
    last(model, "LayerNormalization").replace_input_with(1, first.inputs[1])


def skip_a_layer(model: ir.Model) -> None:
    first = next(node for node in model.graph if node.op_type == "LayerNormalization")
    [node for node in model.graph if node.op_type == "LayerNormalization"][4].replace_input_with(0, first.inputs[0])


def read_the_middle(model: ir.Model) -> None:
    middle = [node for node in model.graph if node.op_type == "LayerNormalization"][2]
    next(node for node in model.graph if node.outputs[0].name == "vision_features").replace_input_with(
        0, middle.outputs[0]
    )


def come_back(model: ir.Model) -> None:
    list(model.graph)[-1].metadata_props[SCOPES] = "['', 'vision_encoder.tower.layers.0', 'x']"


CHANGES = (
    change_attribute,
    change_constant,
    change_op,
    swap_inputs,
    share_a_parameter,
    skip_a_layer,
    read_the_middle,
    come_back,
)


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_difference_between_layers_is_seen(change: Callable[[ir.Model], None] | None, short: ir.Model) -> None:
    component = component_of(moiie(4, 1), "vision_encoder")
    model = ir.Model(short.graph.clone(), ir_version=short.ir_version)
    if change is not None:
        change(model)
    before = text_of(model)
    assert deepen(model, Stack(component.layers, 4, 1), component) is (change is None)
    assert (text_of(model) == before) is (change is not None), "all or nothing"


def test_what_differs_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = moiie(4, 1)
    component, model = component_of(config, "vision_encoder"), model_of(config)
    traced: list[ir.Model] = []

    def trace_badly(*given: Any) -> ir.Model:
        traced.append(_trace(*given))
        if len(traced) == 1:
            change_op(traced[0])
        return traced[-1]

    monkeypatch.setattr(tracing, "_trace", trace_badly)
    found = trace(component, model)
    assert len(traced) == 2
    assert found is traced[1]
    assert {f"{component.layers}.{layer}.mlp.fc1.bias" for layer in range(4)} <= set(found.graph.initializers)
