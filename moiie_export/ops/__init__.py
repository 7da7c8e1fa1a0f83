"""The custom ops of domain `moiie`: one file an op, four faces each.

A file holds the shape legend, the torch reference and its fake, the `Op` record from which the ONNX schema and the
exporter's translation are generated, and the portable ONNX function body. Native lowerings only make an op fast; the
body runs anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from moiie_export.ops import (
    adapter_dispatch,
    cached_attention,
    deformable_sample,
    expert_dispatch,
    modality_router,
    quantized_expert_dispatch,
    quantized_linear,
    topk_route,
)
from moiie_export.ops.op import DOMAIN, Op

OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        adapter_dispatch.OP,
        cached_attention.OP,
        deformable_sample.OP,
        expert_dispatch.OP,
        modality_router.OP,
        quantized_expert_dispatch.OP,
        quantized_linear.OP,
        topk_route.OP,
    )
}
"""Every custom op by its ONNX name."""

__all__ = ["DOMAIN", "OPS", "Op"]
