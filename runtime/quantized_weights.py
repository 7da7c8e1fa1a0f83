"""Weights that a bundle stores in few bits: which they are, and what a graph that multiplies them out takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moiie_runtime.fields import Fields
from moiie_runtime.residency import stored_tensor
from moiie_runtime.tensors import TensorInfo

FORMATS: Mapping[str, int] = {"int4": 2, "int8": 1, "fp8": 1, "w8a8": 1}
"""Format -> values in a stored byte."""
_FLOAT32 = 4
_ONE_AT_A_TIME = 1.5
"""Multiplied out are an expert's two weights, the second half as large as the first, or a single larger one (measured)."""


def read_quantization(top: Fields) -> dict[str, str]:
    """Stored tensor -> format, from the section `quantization` of a manifest; empty when nothing is quantised."""
    section = top.optional_child("quantization")
    if section is None:
        return {}
    return {name: fields.string("format", tuple(FORMATS)) for name, fields in section.children("weights").items()}


@dataclass(frozen=True)
class Unpacking:
    """What one graph takes beside its mapped weights.

    Attributes:
        half: stored bytes of its float16 tensors, scales among them: each is copied to float32.
        floats: bytes of the float32 weights that exist at a time.
    """

    half: int
    floats: int


def unpacking(header: Mapping[str, TensorInfo], names: Iterable[str], formats: Mapping[str, str]) -> Unpacking:
    """For a graph that uses the weights `names` of a file whose quantised tensors are `formats`."""
    half, largest = 0, 0
    for name in names:
        found = stored_tensor(header, name)
        if found is None:
            continue
        info, share = found
        if info.dtype == "F16":
            half += info.nbytes // share
        elif info.name in formats:
            largest = max(largest, info.nbytes // share * FORMATS[formats[info.name]] * _FLOAT32)
    return Unpacking(half, int(largest * _ONE_AT_A_TIME))
