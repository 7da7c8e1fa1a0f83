"""Whether the parser took over how many keys an attention may see.

Published descriptions of TRT_Attention differ between releases in which input holds that number, and the parsers that were
tried leave out what they do not expect there without a word: the engine would attend to slots that nothing was written to.
"""

from __future__ import annotations

from typing import Any

from moiie_runtime.errors import MoiieError

_LAYER = "ATTENTION_INPUT"
_QUERY_KEY_VALUE = 3


def check_lengths(network: Any, name: str, wanted: int) -> None:
    """Count the attention layers of what the parser made that read how many keys there are.

    Args:
        network: TensorRT's.
        name: of the graph, for the error.
        wanted: TRT_Attention nodes of the graph with that input.

    Raises:
        MoiieError: an attention has lost it.
    """
    if wanted == 0:
        return
    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = sum(layer.type.name == _LAYER and _counts_keys(layer) for layer in layers)
    if found < wanted:
        raise MoiieError(
            f"{name}: of {wanted} attention nodes TensorRT reads the number of keys of {found}: its parser takes "
            "input 5 of TRT_Attention for something else, or leaves it out",
            "build with another release of TensorRT, or for a target whose dialect is trt10, which has no such op",
        )


def _counts_keys(layer: Any) -> bool:
    """Whether a whole number for each row of the batch goes in."""
    inputs = [layer.get_input(index) for index in range(_QUERY_KEY_VALUE, layer.num_inputs)]
    return any(each is not None and each.dtype.name == "INT32" and len(each.shape) == 1 for each in inputs)
