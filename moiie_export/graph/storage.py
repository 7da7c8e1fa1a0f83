"""Where the parameters of a graph lie in a weights file, as the external tensors that ONNX points with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import onnx_ir as ir

from moiie_export.quantize.packing import INPUT_SCALE, SCALES
from moiie_export.quantize.scheme import Scheme
from moiie_export.weights import Shape, WeightMap
from moiie_runtime.tensors import TensorInfo

_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "I8": ir.DataType.INT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class Storage:
    """A weights file and what its tensors mean.

    Attributes:
        weight_map: which bundle tensor holds which parameters.
        header: of the weights file.
        file: its name, beside the graphs.
        schemes: bundle tensor -> its form, for those that are quantised.
    """

    weight_map: WeightMap
    header: Mapping[str, TensorInfo]
    file: str
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> dict[str, tuple[str, int, Shape]]:
        """Parameter -> (bundle tensor that holds it, elements before it there, its shape).

        A stack whose experts differ in form is stored as one tensor per expert, under the parameters' names.
        """
        return {
            name: (name, 0, shape) if name in self.header else (weight.name, start, shape)
            for name, (weight, start, shape) in self.weight_map.by_parameter().items()
        }

    def scheme(self, parameter: str) -> Scheme | None:
        """The form of a parameter; None when it is stored as floats."""
        return self.schemes.get(self.parameters[parameter][0])

    def plain(self, parameter: str) -> ir.ExternalTensor:
        """A parameter that is stored as floats."""
        stored, start, shape = self.parameters[parameter]
        return self._tensor(parameter, stored, start, shape)

    def quantized(self, parameter: str, scheme: Scheme) -> list[ir.ExternalTensor]:
        """A quantised parameter: its numbers, its scales and, for w8a8, the scale of its inputs."""
        stored, start, shape = self.parameters[parameter]
        kind = ir.DataType.INT4 if scheme.format == "int4" else None
        per_scale = scheme.group_size or shape[-1]
        scales = (*shape[:-1], shape[-1] // per_scale) if scheme.grouped else shape[:-1]
        tensors = [
            self._tensor(parameter, stored, start, shape, kind),
            self._tensor(parameter + SCALES, stored + SCALES, start // per_scale, scales),
        ]
        if scheme.format == "w8a8":
            tensors.append(self._tensor(parameter + INPUT_SCALE, stored + INPUT_SCALE, 0, (1,)))
        return tensors

    def _tensor(
        self, name: str, stored: str, start: int, shape: Shape, kind: ir.DataType | None = None
    ) -> ir.ExternalTensor:
        """Elements [start, start + prod(shape)) of a stored tensor, seen as `kind` where that is not its own dtype."""
        info = self.header[stored]
        dtype = kind or _DTYPES[info.dtype]
        return ir.ExternalTensor(
            self.file,
            offset=info.offset + int(start * dtype.itemsize),
            length=int(prod(shape) * dtype.itemsize),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
