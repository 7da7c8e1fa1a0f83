"""What a TensorRT engine multiplies out of weights that are stored in few bits, beside its results.

Read off plans of TensorRT for RTX 1.7.1, which name what they work in; of TensorRT itself nothing is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_FUSED = "int4"
"""Constants in this format are multiplied out inside the products."""
_INT8 = "int8"
_EXPERTS = ".experts."

Weight = tuple[str, str, int]
"""Name, format, how many numbers."""


def copied_numbers(weights: Iterable[Weight], dialect: str, plugins: str, banks: str) -> int:
    """Numbers of a graph's quantised weights that exist at a time in the target's precision.

    Without plugins those of one layer's experts do, because its dense body waits for its routes. Of linear layers with int8
    in groups all do, where it was seen: dialect rtx.

    Args:
        weights: the quantised ones that the graph uses.
        dialect: the target's, as are the others.
        plugins: whether it uses the plugin library.
        banks: whether experts are inputs or constants.
    """
    layers: Counter[str] = Counter()
    linear = 0
    for name, form, numbers in weights:
        layer, expert, _ = name.partition(_EXPERTS)
        if not expert:
            linear += numbers if form == _INT8 and dialect == "rtx" else 0
        elif plugins != "required" and (banks == "inputs" or form != _FUSED):
            layers[layer] += numbers
    return linear + max(layers.values(), default=0)
