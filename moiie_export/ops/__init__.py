"""The custom ops of domain `moiie`: one file an op, four faces each.

A file holds the shape legend, the torch reference and its fake, the `Op` record from which the ONNX schema and the
exporter's translation are generated, and the portable ONNX function body. Native lowerings only make an op fast; the
body runs anywhere.

The files are imported, and torch with them, when `OPS` is first asked for: engines are built without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from moiie_export.ops.op import DOMAIN, Op

_FILES = (
    "adapter_dispatch",
    "cached_attention",
    "deformable_sample",
    "expert_dispatch",
    "modality_router",
    "quantized_expert_dispatch",
    "quantized_linear",
    "topk_route",
)

if TYPE_CHECKING:
    OPS: Mapping[str, Op]
    """Every custom op by its ONNX name."""


def __getattr__(name: str) -> Mapping[str, Op]:
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = [import_module(f"{__name__}.{each}").OP for each in _FILES]
    globals()[name] = {op.name: op for op in found}
    return globals()[name]  # type: ignore[no-any-return]


__all__ = ["DOMAIN", "OPS", "Op"]
