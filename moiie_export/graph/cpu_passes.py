"""A portable graph -> the form that runs fastest on this machine's CPU. Weights keep their names; their bytes come later."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from moiie_export.graph.cpu_attention import Heads, fuse_attention
from moiie_export.graph.cpu_contrib import lower_to_contrib
from moiie_export.graph.cpu_native import Plan, fuse_routing, lower_to_kernels
from moiie_export.graph.cpu_norms import fuse_norms
from moiie_export.graph.passes import attach_bodies
from moiie_export.graph.rewriting import CONTRIB, clean, fixed_sizes, initializer_for_later, is_for_later, replace
from moiie_runtime.engines import KERNELS
from moiie_runtime.errors import MoiieError

_VERSION = 1
"""Of the kernels' and of ONNX Runtime's own ops."""


@dataclass
class Lowered:
    """What the graphs of one engine want of its weights file.

    Attributes:
        packed: parameters in the kernels' form.
        plain: other weights, as they lie in the bundle, by name; float16 ones become float32.
    """

    packed: Plan = field(default_factory=dict)
    plain: dict[str, ir.ExternalTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CpuSettings:
    """How graphs are rewritten.

    Attributes:
        heads: attention heads of the decoder.
        kv_dtype: storage of keys and values, float32 or float16.
        kernels: use our own kernels for quantised layers; else ONNX Runtime's.
    """

    heads: Heads
    kv_dtype: str
    kernels: bool


def lower(model: ir.Model, settings: CpuSettings, into: Lowered) -> None:
    """Rewrite one graph of a bundle in place.

    Args:
        model: as it lies in the bundle.
        settings: see there.
        into: gets the weights that the graph uses.

    Raises:
        MoiieError: keys and values cannot be stored as float16 in this graph.
    """
    model.functions.clear()
    buffers = [value for value in (*model.graph.inputs, *model.graph.outputs) if _is_buffer(value)]
    if settings.kv_dtype == "float16":
        for value in buffers:
            value.dtype = ir.DataType.FLOAT16
    rewritten = fuse_attention(model, settings.heads, settings.kernels) if buffers else 0
    if buffers and settings.kv_dtype == "float16" and 4 * rewritten != len(buffers):
        raise MoiieError(
            f"{model.graph.name}: keys and values as float16 need a head size that is a multiple of 16, "
            f"this model has {settings.heads.size}",
            "use kv_cache: float32",
        )
    fuse_norms(model)
    if settings.kernels:
        lower_to_kernels(model, into.packed)
        fuse_routing(model)
    else:
        lower_to_contrib(model, into.packed)
    _widen(model, into.plain)
    clean(model)
    _collect(model, into)
    attach_bodies(model)
    model.opset_imports[CONTRIB] = _VERSION
    if any(node.domain == KERNELS for node in model.graph):
        model.opset_imports[KERNELS] = _VERSION


def _is_buffer(value: ir.Value) -> bool:
    return str(value.name).startswith(("past_key_values.", "present."))


def _widen(model: ir.Model, plain: dict[str, ir.ExternalTensor]) -> None:
    """Cast(float16 weight) -> the weight as float32, which then can be mapped; a copy would be made of a cast one."""
    for node in list(model.graph):
        stored = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
        if stored is None or not isinstance(stored.const_value, ir.ExternalTensor):
            continue
        tensor = stored.const_value
        if tensor.dtype != ir.DataType.FLOAT16 or node.attributes["to"].as_int() != ir.DataType.FLOAT:
            continue
        name = str(stored.name)
        stored.name = f"{name}.float16"
        wide = initializer_for_later(model, name, ir.DataType.FLOAT, fixed_sizes(tensor.shape))
        replace(node.outputs[0], wide)
        plain[name] = tensor


def _collect(model: ir.Model, into: Lowered) -> None:
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor) and not is_for_later(value):
            into.plain[name] = value.const_value
