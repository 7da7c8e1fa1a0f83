"""Quantisation methods by name. A method quantises a block of whole rows; rows are independent of each other.

Finding a method imports its module and with it torch; listing names does not, so that recipes are checked without torch
and numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from moiie_export.quantize.scheme import FORMATS, Scheme
from moiie_runtime.errors import MoiieError

if TYPE_CHECKING:
    from moiie_export.quantize.packing import Float32, Quantized
    from moiie_export.quantize.statistics import InputStatistics


class Quantizer(Protocol):
    """What a method is."""

    def __call__(
        self, weight: Float32, scheme: Scheme, stats: InputStatistics | None = None, *, name: str = "weight"
    ) -> Quantized:
        """Quantise rows.

        Args:
            weight: float32 [N, K]; not changed.
            scheme: the form wanted.
            stats: of the layer's input; None where calibration saw nothing of it.
            name: of the tensor, for messages.

        Returns:
            The rows' numbers and scales; `method` and `note` tell where the method fell back to another.

        Raises:
            MoiieError: NaN, infinity or a number out of range in the weight, rows that do not divide into groups.
        """
        ...


_PACKAGE = "moiie_export.quantize"
_BUILT_IN: dict[tuple[str, str], str] = {
    ("int4", "rtn"): f"{_PACKAGE}.rtn:rtn",
    ("int8", "rtn"): f"{_PACKAGE}.rtn:rtn",
    ("int4", "awq"): f"{_PACKAGE}.awq:awq",
    ("int8", "awq"): f"{_PACKAGE}.awq:awq",
    ("int4", "gptq"): f"{_PACKAGE}.gptq:gptq",
    ("int8", "gptq"): f"{_PACKAGE}.gptq:gptq",
    ("fp8", "rtn"): f"{_PACKAGE}.fp8:fp8",
    ("w8a8", "rtn"): f"{_PACKAGE}.w8a8:w8a8",
}
_ADDED: dict[tuple[str, str], Quantizer] = {}

CALIBRATED = ("awq", "gptq")
"""Methods that need input statistics of every weight; w8a8 needs them for its activations whatever the method."""


def register(method: str, formats: Sequence[str], quantizer: Quantizer) -> None:
    """Add a method of one's own.

    Args:
        method: its name in recipes.
        formats: which formats it makes.
        quantizer: the function.

    Raises:
        MoiieError: one of the formats has a method of this name, or does not exist.
    """
    for format_ in formats:
        if format_ not in FORMATS:
            raise MoiieError(f"method {method!r}: no format {format_!r}; expected {', '.join(FORMATS)}")
        if method in methods_of(format_):
            raise MoiieError(f"method {method!r} for {format_} exists already", "choose another name")
    _ADDED.update({(format_, method): quantizer for format_ in formats})


def methods_of(format_: str) -> tuple[str, ...]:
    """Names of the methods that make a format, in the order of their cost."""
    return tuple(method for known, method in (*_BUILT_IN, *_ADDED) if known == format_)


def quantizer(method: str, format_: str) -> Quantizer:
    """The function of a method.

    Raises:
        MoiieError: the format has no such method.
    """
    key = (format_, method)
    if key in _ADDED:
        return _ADDED[key]
    if key not in _BUILT_IN:
        raise MoiieError(f"method {method!r} for {format_}: expected one of {', '.join(methods_of(format_))}")
    module, function = _BUILT_IN[key].split(":")
    found: Quantizer = getattr(import_module(module), function)
    return found
