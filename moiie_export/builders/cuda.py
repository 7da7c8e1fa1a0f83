"""The `ort-cuda` target: graphs for ONNX Runtime's CUDA provider, one weights file; built without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from moiie_export.builders import BuildPlan, BuildRequest, BuildResult
from moiie_export.builders.cuda_weights import weights_specs, write_engine_weights
from moiie_export.builders.graph_files import WEIGHTS_FILE, graph_sections, save_graphs
from moiie_export.builders.output import describe, finished, reuse, write_output
from moiie_export.graph.cpu_attention import Heads
from moiie_export.graph.cuda_experts import OLDEST_RELEASE
from moiie_export.graph.cuda_passes import CudaSettings, CudaWeights, lower
from moiie_export.stages import Progress
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensor_header import TensorInfo, build_header

CODE = 1
"""Raised whenever this builder would write something else for the same bundle."""
_PEAK = 500 * 2**20
_UNKNOWN_FORMATS = ("fp8", "w8a8")
_LIBRARY = "onnxruntime"


def build_cuda(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build BUNDLE/engines/<target> for ONNX Runtime on an NVIDIA GPU.

    Raises:
        MoiieError: a damaged bundle, or weights or a precision that ONNX Runtime has no kernels for.
    """
    bundle = _opened(request)
    head = _head(request, bundle)
    done = reuse(request, head)
    if done is not None:
        return done
    models, weights = _lowered(request, bundle)

    def fill(directory: Path) -> Mapping[str, Any]:
        header = write_engine_weights(weights, bundle.path(bundle.weights_file), directory / WEIGHTS_FILE, progress)
        save_graphs(models, header, directory)
        return _document(request, bundle, models, header)

    return write_output(request, head, _bytes(weights), fill)


def plan_cuda(request: BuildRequest) -> BuildPlan:
    """What a build would do; nothing is written."""
    bundle = _opened(request)
    done = None if request.force else finished(request, _head(request, bundle))
    if done is not None:
        return BuildPlan(True, _PEAK, done.files[WEIGHTS_FILE]["bytes"])
    return BuildPlan(False, _PEAK, _bytes(_lowered(request, bundle)[1]))


def _opened(request: BuildRequest) -> Bundle:
    bundle = Bundle.open(request.bundle)
    bundle.check_files()
    target = request.target
    if target.precision == "bfloat16":
        raise MoiieError(
            f"target {target.name}: precision bfloat16 is not written for ONNX Runtime", "use float16 or float32"
        )
    formats = {entry["format"] for entry in bundle.raw.get("quantization", {}).get("weights", {}).values()}
    unknown = sorted(formats.intersection(_UNKNOWN_FORMATS))
    if unknown:
        raise MoiieError(
            f"{bundle.name}: ONNX Runtime has no kernels for {unknown[0]} weights",
            "export the bundle with int8 or int4, or build it for a TensorRT target",
        )
    return bundle


def _head(request: BuildRequest, bundle: Bundle) -> dict[str, Any]:
    return describe(request, bundle, (_LIBRARY, OLDEST_RELEASE), CODE)


def _lowered(request: BuildRequest, bundle: Bundle) -> tuple[dict[str, ir.Model], CudaWeights]:
    heads = Heads(bundle.model.num_attention_heads, bundle.model.num_key_value_heads, bundle.model.head_dim)
    islands = bundle.raw.get("quantization", {}).get("islands", [])
    settings = CudaSettings(request.target, heads, frozenset(str(each) for each in islands))
    models = {name: ir.load(bundle.path(bundle.components[name].file)) for name in bundle.phases}
    return models, lower(models, settings)


def _bytes(weights: CudaWeights) -> int:
    head, header = build_header(Path(WEIGHTS_FILE), weights_specs(weights), None)
    return len(head) + sum(info.nbytes for info in header.values())


def _document(
    request: BuildRequest, bundle: Bundle, models: Mapping[str, ir.Model], header: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    fused = any(node.op_type == "MoE" for model in models.values() for node in model.graph)
    return {
        **graph_sections(bundle, models, header),
        "kv_cache": {"dtype": request.target.precision},
        "weights_file": WEIGHTS_FILE,
        "prefill_chunk": request.target.prefill_chunk or max(request.target.prefill),
        "threads": request.target.threads,
        "prepack": False,
        "needs": {_LIBRARY: OLDEST_RELEASE} if fused else {},
    }
