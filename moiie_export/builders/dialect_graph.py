"""A component's graph in a target's dialect: what TensorRT is given to build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_export.builders.engine_specs import decode_experts
from moiie_export.targets import Target
from moiie_runtime.bundle import Bundle

if TYPE_CHECKING:
    import onnx_ir as ir

    from moiie_export.graph.trt_context import TrtContext


def lower_component(bundle: Bundle, component: str, target: Target) -> tuple[ir.Model, TrtContext]:
    """The graph, and what the passes found out about it; the same for the same bundle and target.

    Raises:
        MoiieError: the graph holds something that the dialect has no form for.
    """
    from moiie_export.graph.trt import lower
    from moiie_export.graph.trt_context import TrtContext

    islands = bundle.raw.get("quantization", {}).get("islands", [])
    context = TrtContext(component, target, decode_experts(bundle), frozenset(str(each) for each in islands))
    return lower(bundle.path(bundle.components[component].file), context), context


def save_graph(model: ir.Model, component: str, folder: Path) -> Path:
    """Write FOLDER/<component>.onnx, its weights beside it."""
    import onnx_ir as ir

    folder.mkdir(exist_ok=True)
    path = folder / f"{component}.onnx"
    ir.save(model, path, external_data=f"{component}.data")
    return path


def target_of(document: Mapping[str, Any]) -> Target:
    """The target that engine.json describes."""
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document["settings"].items()
    }
    return Target(**settings)
