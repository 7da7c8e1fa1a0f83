"""Built graphs that refer to one weights file: their places in it, and what engine.json says about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from moiie_export.graph.rewriting import fixed_sizes
from moiie_runtime.bundle import Bundle
from moiie_runtime.tensor_header import TensorInfo

WEIGHTS_FILE = "weights.safetensors"


def save_graphs(models: Mapping[str, ir.Model], header: Mapping[str, TensorInfo], directory: Path) -> None:
    """Write each graph as NAME.onnx, its weights as places in the weights file beside it.

    Args:
        models: component -> graph.
        header: where each tensor lies in the file.
        directory: gets the graphs.
    """
    tensors = {name: _external(info, models) for name, info in header.items()}
    for name, model in models.items():
        for key, value in model.graph.initializers.items():
            tensor = tensors.get(key)
            if tensor is not None:
                value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
        ir.save(model, directory / f"{name}.onnx")


def _external(info: TensorInfo, models: Mapping[str, ir.Model]) -> ir.ExternalTensor:
    """A tensor as graphs refer to it: int4 values keep their type there."""
    known = next(
        model.graph.initializers[info.name] for model in models.values() if info.name in model.graph.initializers
    )
    assert known.const_value is not None
    tensor = known.const_value
    shape = info.shape
    if isinstance(tensor, ir.ExternalTensor) and info.dtype != "U8":
        shape = fixed_sizes(tensor.shape)
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        offset=info.offset,
        length=info.nbytes,
        dtype=tensor.dtype,
        shape=ir.Shape(shape),
        name=info.name,
    )


def graph_sections(
    bundle: Bundle, models: Mapping[str, ir.Model], header: Mapping[str, TensorInfo]
) -> dict[str, dict[str, Any]]:
    """The sections `components` and `residency` of engine.json."""
    used = {name: sorted({*model.graph.initializers} & {*header}) for name, model in models.items()}
    return {
        "components": {name: _component(bundle, name, model) for name, model in models.items()},
        "residency": {
            phase: {"weights": used[name], "bytes": sum(header[each].nbytes for each in used[name])}
            for name, phase in bundle.phases.items()
        },
    }


def _component(bundle: Bundle, name: str, model: ir.Model) -> dict[str, Any]:
    """The graph's section: as in the bundle, but for what has become float16."""
    described = bundle.raw["components"][name]
    halves = {str(value.name) for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT16}
    halves |= {str(value.name) for value in model.graph.outputs if value.dtype == ir.DataType.FLOAT16}

    def specs(key: str) -> list[dict[str, Any]]:
        return [{**each, "dtype": "float16"} if each["name"] in halves else each for each in described[key]]

    return {"file": f"{name}.onnx", "inputs": specs("inputs"), "outputs": specs("outputs")}
