"""A graph stage: trace one component, run the portable passes, check the file, describe it for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_export.families import family_of
from moiie_export.quantize.packing import INPUT_SCALE, SCALES
from moiie_export.quantize.scheme import Scheme
from moiie_export.source import Described
from moiie_export.weights_stage import WEIGHTS_FILE
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.tensors import read_header

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH_CODE = 6
"""Raised whenever tracing or passes would write another graph for the same model."""


def write_graph(
    name: str, source: Described, capacity: int, directory: Path, schemes: Mapping[str, Scheme] | None = None
) -> Mapping[str, Any]:
    """Write onnx/<name>.onnx into the bundle under construction.

    Args:
        name: the component.
        source: the model, its weight map as the weights file holds it.
        capacity: tokens of the key-value buffers.
        directory: the bundle.
        schemes: weight -> how it is quantised, of those that are.

    Returns:
        Notes for the manifest: inputs, outputs, op_counts, weights (parameters used) and weight_bytes.

    Raises:
        MissingDependency: torch or onnx is not installed.
        MoiieError: the graph fails onnx's full check, or lacks data.
    """
    try:
        import onnx_ir
        import torch  # noqa: F401 - named here so that its absence is told apart from a defect
    except ImportError as error:
        raise MissingDependency(f"export needs {error.name}", "pip install 'moiie-export[export]'") from error
    from moiie_export.graph.passes import PORTABLE, PassContext
    from moiie_export.graph.trace import trace
    from moiie_export.model.load import empty_model

    component = next(item for item in family_of(source.config).components(source.config, capacity) if item.name == name)
    header = read_header(directory / WEIGHTS_FILE)
    context = PassContext(component, source.weight_map, header, Path(WEIGHTS_FILE).name, schemes or {})
    model = trace(component, empty_model(source))
    for graph_pass in PORTABLE:
        graph_pass(model, context)
    path = directory / component.file
    temporary = path.with_name(path.name + ".tmp")
    onnx_ir.save(model, temporary)
    _check(temporary, name)
    temporary.replace(path)
    return _describe(model, source)


def _check(path: Path, name: str) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MoiieError(
            f"{name}: the exported graph is not valid ONNX: {error}", "this is a defect of the exporter"
        ) from error


def _describe(model: ir.Model, source: Described) -> dict[str, Any]:
    parameters = source.weight_map.by_parameter()
    used = sorted(name for name in model.graph.initializers if _owner(name) in parameters)
    stored = {name: model.graph.initializers[name].const_value for name in used}
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)
    return {
        "inputs": [_signature(value) for value in model.graph.inputs],
        "outputs": [_signature(value) for value in model.graph.outputs],
        "op_counts": dict(sorted(counts.items())),
        "weights": used,
        "weight_bytes": sum(tensor.nbytes for tensor in stored.values() if tensor is not None),
    }


def _owner(name: str) -> str:
    """The parameter that a stored tensor belongs to: itself, or the one whose scales it holds."""
    return name.removesuffix(INPUT_SCALE).removesuffix(SCALES)


def _signature(value: ir.Value) -> dict[str, Any]:
    names = {"FLOAT": "float32", "INT32": "int32", "INT64": "int64"}
    shape = [] if value.shape is None else [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return {"name": value.name, "dtype": names[str(value.dtype)], "shape": shape}
