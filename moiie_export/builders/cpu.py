"""The `cpu` target: graphs with fused ops, weights in the form that our kernels read in place, one file for all phases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from moiie_export.builders import BuildPlan, BuildRequest, BuildResult
from moiie_export.builders.cpu_weights import WEIGHTS_FILE, weights_specs, write_engine_weights
from moiie_export.builders.output import describe, finished, write_output
from moiie_export.graph.cpu_attention import Heads
from moiie_export.graph.cpu_passes import CpuSettings, Lowered, lower, point_at
from moiie_export.graph.rewriting import fixed_sizes
from moiie_export.stages import Progress
from moiie_runtime import native
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import KERNELS
from moiie_runtime.errors import MissingDependency
from moiie_runtime.tensor_header import TensorInfo, build_header

_log = logging.getLogger(__name__)

CODE = 1
"""Raised whenever this builder would write something else for the same bundle."""
PREFILL_CHUNK = 512
"""Tokens of a prompt at a time: more gain nothing, and what they work with would grow with the prompt."""
_PEAK = 300 * 2**20


def build_cpu(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build BUNDLE/engines/<target> for ONNX Runtime on a CPU.

    Raises:
        MissingDependency: the kernels cannot be compiled here.
        MoiieError: a damaged bundle, or settings it cannot be built with.
    """
    bundle = Bundle.open(request.bundle)
    bundle.check_files()
    head = _head(request, bundle)
    done = None if request.force else finished(request, head)
    if done is not None:
        return done
    models, lowered = _lowered(request, bundle)

    def fill(directory: Path) -> Mapping[str, Any]:
        weights = bundle.path(bundle.weights_file)
        file = write_engine_weights(lowered, weights, directory / WEIGHTS_FILE, progress)
        tensors = {name: _external(info, models) for name, info in file.header.items()}
        point_at(models.values(), tensors)
        for name, model in models.items():
            ir.save(model, directory / f"{name}.onnx")
        return _document(request, bundle, models, file.header)

    return write_output(request, head, _bytes(lowered), fill)


def plan_cpu(request: BuildRequest) -> BuildPlan:
    """What a build would do; nothing is written."""
    bundle = Bundle.open(request.bundle)
    bundle.check_files()
    done = None if request.force else finished(request, _head(request, bundle))
    if done is not None:  # its graphs need not be rewritten to know the size
        return BuildPlan(True, _PEAK, done.files[WEIGHTS_FILE]["bytes"])
    return BuildPlan(False, _PEAK, _bytes(_lowered(request, bundle)[1]))


def _head(request: BuildRequest, bundle: Bundle) -> dict[str, Any]:
    return describe(request, bundle, ("onnxruntime", onnxruntime.__version__), CODE)


def _lowered(request: BuildRequest, bundle: Bundle) -> tuple[dict[str, ir.Model], Lowered]:
    heads = Heads(bundle.model.num_attention_heads, bundle.model.num_key_value_heads, bundle.model.head_dim)
    quantised = "quantization" in bundle.raw
    settings = CpuSettings(heads, request.target.kv_cache, quantised and _has_kernels())
    lowered = Lowered()
    models = {}
    for name in bundle.phases:
        models[name] = ir.load(bundle.path(bundle.components[name].file))
        lower(models[name], settings, lowered)
    return models, lowered


def _has_kernels() -> bool:
    """Whether our own kernels can be compiled here; without them quantised layers run in ONNX Runtime's."""
    try:
        native.library()
    except MissingDependency as error:
        _log.warning("%s; using ONNX Runtime's own operators, which are slower", error.message)
        return False
    return True


def _bytes(lowered: Lowered) -> int:
    head, header = build_header(Path(WEIGHTS_FILE), weights_specs(lowered), None)
    return len(head) + sum(info.nbytes for info in header.values())


def _external(info: TensorInfo, models: Mapping[str, ir.Model]) -> ir.ExternalTensor:
    """A tensor of the engine's file as graphs refer to it: int4 values keep their type there."""
    known = next(
        model.graph.initializers[info.name] for model in models.values() if info.name in model.graph.initializers
    )
    assert known.const_value is not None
    tensor = known.const_value
    shape = info.shape
    if isinstance(tensor, ir.ExternalTensor) and info.dtype != "U8":
        shape = fixed_sizes(tensor.shape)
    dtype = known.const_value.dtype
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        offset=info.offset,
        length=info.nbytes,
        dtype=dtype,
        shape=ir.Shape(shape),
        name=info.name,
    )


def _document(
    request: BuildRequest, bundle: Bundle, models: Mapping[str, ir.Model], header: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    used = {name: sorted({*model.graph.initializers} & {*header}) for name, model in models.items()}
    kernels = any(node.domain == KERNELS for model in models.values() for node in model.graph)
    return {
        "components": {name: _component(bundle, name, model) for name, model in models.items()},
        "residency": {
            phase: {"weights": used[name], "bytes": sum(header[each].nbytes for each in used[name])}
            for name, phase in bundle.phases.items()
        },
        "kv_cache": {"dtype": request.target.kv_cache},
        "weights_file": WEIGHTS_FILE,
        "prefill_chunk": request.target.prefill_chunk or PREFILL_CHUNK,
        "threads": request.target.threads,
        "prepack": not kernels and "quantization" in bundle.raw,
        "needs": {KERNELS: str(native.LAYOUT)} if kernels else {},
    }


def _component(bundle: Bundle, name: str, model: ir.Model) -> dict[str, Any]:
    """The graph's section of engine.json: as in the bundle, but for the storage of keys and values."""
    described = bundle.raw["components"][name]
    halves = {str(value.name) for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT16}
    halves |= {str(value.name) for value in model.graph.outputs if value.dtype == ir.DataType.FLOAT16}

    def specs(key: str) -> list[dict[str, Any]]:
        return [{**each, "dtype": "float16"} if each["name"] in halves else each for each in described[key]]

    return {"file": f"{name}.onnx", "inputs": specs("inputs"), "outputs": specs("outputs")}
