"""Attention that lost the number of its keys on the way through a parser."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export.builders.dialect_graph import lower_component
from moiie_export.builders.parsed_attention import check_lengths
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from tests.exports import SMALLEST, exported
from tests.trt_graphs import target

HALF, COUNTS = ("HALF", (1, 32, 64, 96)), ("INT32", (1,))


def network(*layers: tuple[str, list[Any]]) -> Any:
    """What a parser made: each layer's type, and the type and shape of its inputs."""

    def layer(kind: str, inputs: list[Any]) -> Any:
        tensors = [x if x is None else SimpleNamespace(dtype=SimpleNamespace(name=x[0]), shape=x[1]) for x in inputs]
        return SimpleNamespace(type=SimpleNamespace(name=kind), num_inputs=len(inputs), get_input=tensors.__getitem__)

    made = [layer(*each) for each in layers]
    return SimpleNamespace(num_layers=len(made), get_layer=made.__getitem__)


def test_lengths_that_came_through() -> None:
    attention = ("ATTENTION_INPUT", [HALF, HALF, HALF, None, None, None, COUNTS])
    masked = ("ATTENTION_INPUT", [HALF, HALF, HALF, ("BOOL", (1, 1, 64, 64)), COUNTS])
    made = network(("SHAPE", [HALF]), attention, masked, ("ATTENTION_INPUT", [HALF] * 3))
    check_lengths(made, "decoder", 2)
    check_lengths(network(), "vision", 0)
    with pytest.raises(MoiieError, match="of 3 attention nodes TensorRT reads the number of keys of 2"):
        check_lengths(made, "decoder", 3)


@pytest.mark.parametrize("others", [[], [("BOOL", (1, 1, 64, 64))], [("INT32", (1, 64))], [None, None]])
def test_lengths_that_the_parser_left_out(others: list[Any]) -> None:
    whole, lost = (("ATTENTION_INPUT", [HALF, HALF, HALF, *more]) for more in ([COUNTS], others))
    elsewhere = ("KVCACHE_UPDATE", [HALF, HALF, HALF, COUNTS])
    with pytest.raises(MoiieError, match=r"decoder: of 2 attention nodes .* of 1:"):
        check_lengths(network(whole, lost, elsewhere), "decoder", 2)


def test_graphs_say_how_many_to_expect() -> None:
    bundle = Bundle.open(exported(SMALLEST).bundle)
    counts = {name: lower_component(bundle, name, target("rtx"))[1].counted_attention for name in bundle.components}
    layers = sum(name.endswith(".key") for name in bundle.components["decoder_decode"].outputs)
    assert counts == {"decoder_decode": layers, "decoder_prefill": layers, "vision_encoder": 0}
    assert lower_component(bundle, "decoder_decode", target("orin"))[1].counted_attention == 0
