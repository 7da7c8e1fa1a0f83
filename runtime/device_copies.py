"""What a TensorRT engine multiplies out of weights that are stored in few bits, beside its results.

Read off plans of TensorRT for RTX 1.7.1, which name what they work in; of TensorRT itself nothing is known here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_FUSED = "int4"
"""Constants in this format are multiplied out inside the products."""
_COPIED = ("int8", "fp8")
_EXPERTS = ".experts."
_LAYER = re.compile(r".*\.layers\.\d+")

Weight = tuple[str, str, int]
"""Name, format, how many numbers."""


def copied_numbers(weights: Iterable[Weight], dialect: str, plugins: str, banks: str) -> int:
    """Numbers of a graph's quantised weights that exist at a time in the target's precision.

    Without plugins those of one layer's experts do, because its dense body waits for its routes; and of linear layers in int8
    or fp8 those of one layer, where it was seen: dialect rtx.

    Args:
        weights: the quantised ones that the graph uses.
        dialect: the target's, as are the others.
        plugins: whether it uses the plugin library.
        banks: whether experts are inputs or constants.
    """
    experts: Counter[str] = Counter()
    linear: Counter[str] = Counter()
    for name, form, numbers in weights:
        layer, expert, _ = name.partition(_EXPERTS)
        if not expert:
            found = _LAYER.match(name)
            linear[found[0] if found else name] += numbers if form in _COPIED and dialect == "rtx" else 0
        elif plugins != "required" and (banks == "inputs" or form != _FUSED):
            experts[layer] += numbers
    return max(linear.values(), default=0) + max(experts.values(), default=0)
