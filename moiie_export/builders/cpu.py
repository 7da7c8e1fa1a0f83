"""The `cpu` target: graphs with fused ops, weights in the form that our kernels read in place, one file for all phases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from moiie_export.builders import BuildPlan, BuildRequest, BuildResult
from moiie_export.builders.cpu_weights import weights_specs, write_engine_weights
from moiie_export.builders.graph_files import WEIGHTS_FILE, graph_sections, save_graphs
from moiie_export.builders.output import describe, finished, reuse, write_output
from moiie_export.graph.cpu_attention import Heads
from moiie_export.graph.cpu_passes import CpuSettings, Lowered, lower
from moiie_export.stages import Progress
from moiie_runtime import native
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import KERNELS
from moiie_runtime.tensor_header import TensorInfo, build_header

_log = logging.getLogger(__name__)

CODE = 1
"""Raised whenever this builder would write something else for the same bundle."""
PREFILL_CHUNK = 512
"""Tokens of a prompt at a time: more gain nothing, and what they work with would grow with the prompt."""
_PEAK = 300 * 2**20
_NO_COMPILER = (
    "no C++ compiler here: quantised layers run in ONNX Runtime's own operators, which are slower; "
    "with one installed, build again"
)


def build_cpu(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build BUNDLE/engines/<target> for ONNX Runtime on a CPU.

    Raises:
        MoiieError: a damaged bundle, settings it cannot be built with, or the compiler fails on the kernels.
    """
    bundle = Bundle.open(request.bundle)
    bundle.check_files()
    head = _head(request, bundle)
    done = reuse(request, head)
    if done is not None:
        return done
    if _kernels(bundle) is not None:
        native.library()
    elif _quantised(bundle):
        _log.warning(_NO_COMPILER)
    models, lowered = _lowered(request, bundle)

    def fill(directory: Path) -> Mapping[str, Any]:
        weights = bundle.path(bundle.weights_file)
        file = write_engine_weights(lowered, weights, directory / WEIGHTS_FILE, progress)
        save_graphs(models, file.header, directory)
        return _document(request, bundle, models, file.header)

    return write_output(request, head, _bytes(lowered), fill)


def plan_cpu(request: BuildRequest) -> BuildPlan:
    """What a build would do; nothing is written or compiled."""
    bundle = Bundle.open(request.bundle)
    bundle.check_files()
    notes = (_NO_COMPILER,) if _quantised(bundle) and _kernels(bundle) is None else ()
    done = None if request.force else finished(request, _head(request, bundle))
    if done is not None:  # its graphs need not be rewritten to know the size
        return BuildPlan(True, _PEAK, done.files[WEIGHTS_FILE]["bytes"], notes=notes)
    return BuildPlan(False, _PEAK, _bytes(_lowered(request, bundle)[1]), notes=notes)


def _head(request: BuildRequest, bundle: Bundle) -> dict[str, Any]:
    return describe(request, bundle, ("onnxruntime", onnxruntime.__version__), [CODE, _kernels(bundle)])


def _lowered(request: BuildRequest, bundle: Bundle) -> tuple[dict[str, ir.Model], Lowered]:
    heads = Heads(bundle.model.num_attention_heads, bundle.model.num_key_value_heads, bundle.model.head_dim)
    settings = CpuSettings(heads, request.target.kv_cache, _kernels(bundle) is not None)
    lowered = Lowered()
    models = {}
    for name in bundle.phases:
        models[name] = ir.load(bundle.path(bundle.components[name].file))
        lower(models[name], settings, lowered)
    return models, lowered


def _kernels(bundle: Bundle) -> int | None:
    """The layout of the kernels that quantised layers will run in; None where none are used or can be compiled."""
    return native.LAYOUT if _quantised(bundle) and native.available() else None


def _quantised(bundle: Bundle) -> bool:
    return bool(bundle.raw.get("quantization", {}).get("weights"))


def _bytes(lowered: Lowered) -> int:
    head, header = build_header(Path(WEIGHTS_FILE), weights_specs(lowered), None)
    return len(head) + sum(info.nbytes for info in header.values())


def _document(
    request: BuildRequest, bundle: Bundle, models: Mapping[str, ir.Model], header: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    kernels = any(node.domain == KERNELS for model in models.values() for node in model.graph)
    return {
        **graph_sections(bundle, models, header),
        "kv_cache": {"dtype": request.target.kv_cache},
        "weights_file": WEIGHTS_FILE,
        "prefill_chunk": request.target.prefill_chunk or PREFILL_CHUNK,
        "threads": request.target.threads,
        "prepack": not kernels and _quantised(bundle),
        "needs": {KERNELS: str(native.LAYOUT)} if kernels else {},
    }
