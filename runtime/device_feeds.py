"""Bytes on a GPU of what is fed to a built form's graphs, a request's adapters among it, and of what they give back.

Every session has buffers of its own: what both decoder graphs are fed lies there twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

from moiie_runtime.backends.device import ITEM_BYTES
from moiie_runtime.backends.expert_banks import DECODE
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.engines import Engine
from moiie_runtime.kv_cache import static_rows
from moiie_runtime.memory import Request, once_components
from moiie_runtime.vision_settings import PatchSettings

_KV = ("past_key_values.", "present.")


def feed_bytes(engine: Engine, request: Request) -> int:
    """Bytes of all sessions of a request: to the byte for TensorRT, from above for ONNX Runtime.

    Args:
        engine: a built form that runs on a device.
        request: what would be asked.
    """
    components = [*once_components(engine.bundle, request), "decoder_prefill", DECODE]
    return sum(_component_bytes(engine, name, _sizes(engine, name, request)) for name in components)


def _component_bytes(engine: Engine, name: str, sizes: Mapping[str, int]) -> int:
    return sum(_nbytes(spec, sizes) for spec in _tensors(engine, name))


def _tensors(engine: Engine, name: str) -> Iterator[TensorSpec]:
    """Those with a buffer of the session's own. ONNX Runtime reads whole numbers on the host, and gives outputs itself."""
    component = engine.bundle.components[name]
    tensorrt = engine.backend.startswith("tensorrt")
    banks = {each for bank in engine.document.get("banks") or () for each in bank["inputs"]}
    tensors = {**component.inputs, **component.outputs} if tensorrt else component.inputs
    for tensor, spec in tensors.items():
        if tensor not in banks and not tensor.startswith(_KV) and (tensorrt or spec.dtype.startswith("float")):
            yield spec


def _sizes(engine: Engine, name: str, request: Request) -> dict[str, int]:
    """Sizes of open dimensions."""
    bundle = engine.bundle
    rows = static_rows(bundle) or request.batch * (request.num_beams if name == DECODE else 1)
    sequence = min(request.prompt_tokens, bundle.prefill_chunk or request.prompt_tokens)
    sizes = {
        "batch": rows,
        "adapters": 1 if request.batch == 1 else rows,
        "sequence": sequence,
        "kept": sequence if request.all_logits else 1,
        "images": 1,  # they go through one by one
        "texts": 1,
    }
    if bundle.instance_router is not None:
        sizes["words"] = bundle.instance_router.max_length
    for encoder in bundle.encoders:
        if encoder.component == name and isinstance(encoder.processor, PatchSettings):
            sizes["patches"] = encoder.processor.max_patches
    return sizes


def _nbytes(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Of a tensor; a dimension is a number, a name, or a product such as `batch*sequence`."""
    factors = [
        int(part) if re.fullmatch("[0-9]{1,18}", part) else sizes.get(part, 1)
        for size in spec.shape
        for part in str(size).split("*")
    ]
    return prod(factors) * ITEM_BYTES[spec.dtype]
