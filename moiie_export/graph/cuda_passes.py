"""A portable graph -> the form for ONNX Runtime on CUDA, in the target's precision. Weights get their bytes later.

* attention: GroupQueryAttention, which has float16 kernels on CUDA only; in float32 the portable body stays;
* experts: MoE, or a loop of MatMulNBits where they are quantised (cuda_experts.py says why);
* norms: SimplifiedLayerNormalization, with the residual where there is one;
* float32 stays what `convert_precision` keeps: routing, coordinates, softmax, islands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from moiie_export.graph.cpu_attention import Heads, fuse_attention
from moiie_export.graph.cpu_contrib import NBits, lower_to_contrib
from moiie_export.graph.cpu_native import Plan
from moiie_export.graph.cpu_norms import fuse_norms
from moiie_export.graph.cuda_experts import Banks, Stack, find_banks, fuse_experts
from moiie_export.graph.passes import attach_bodies
from moiie_export.graph.rewriting import CONTRIB, clean, is_for_later, producer
from moiie_export.graph.trt_context import EXACT, TrtContext, exact
from moiie_export.graph.trt_precision import convert_precision, precision_dtype
from moiie_export.graph.trt_prepare import flatten, is_weight, lift_constants
from moiie_export.targets import Target

_VERSION = 1
"""Of ONNX Runtime's own ops."""


@dataclass(frozen=True)
class CudaSettings:
    """How graphs are rewritten.

    Attributes:
        target: gives the precision.
        heads: attention heads of the decoder.
        islands: names of weights whose linear layers stay float32.
    """

    target: Target
    heads: Heads
    islands: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Converted:
    """A weight that is stored in another type than in the bundle, or in the same."""

    tensor: ir.ExternalTensor
    dtype: ir.DataType


@dataclass
class CudaWeights:
    """What the graphs of one engine want of its weights file, by the name of the initialiser.

    Attributes:
        stacks: experts of a layer.
        packed: weights of MatMulNBits; their scales lie beside them.
        scales: type of these.
        plain: all others.
    """

    stacks: dict[str, Stack] = field(default_factory=dict)
    packed: Plan = field(default_factory=dict)
    scales: ir.DataType = ir.DataType.FLOAT16
    plain: dict[str, Converted] = field(default_factory=dict)


def lower(models: Mapping[str, ir.Model], settings: CudaSettings) -> CudaWeights:
    """Rewrite the graphs of a bundle in place.

    Args:
        models: component -> its graph, as it lies in the bundle.
        settings: see there.

    Returns:
        The weights that they use.
    """
    dtype = precision_dtype(settings.target.precision)
    weights = CudaWeights(scales=dtype)
    for model in models.values():
        model.functions.clear()
        lower_to_contrib(model, weights.packed, NBits(dtype, accuracy_level=0))
        flatten(model)
        _keep_sums(model)
    banks = find_banks(models.values())
    for name, model in models.items():
        _lower(model, name, settings, banks, weights)
    return weights


def _keep_sums(model: ir.Model) -> None:
    """The weighted sums of experts' results in float32; not every provider adds float16 there."""
    for node in model.graph:
        if node.op_type == "ScatterND" and node.attributes.get_string("reduction", "none") == "add":
            weighted = producer(node.inputs[2], "Mul")
            exact(node, *([] if weighted is None else [weighted]))


def _lower(model: ir.Model, name: str, settings: CudaSettings, banks: Banks, weights: CudaWeights) -> None:
    dtype = weights.scales
    if name.startswith("decoder_") and dtype == ir.DataType.FLOAT16:
        fuse_attention(model, settings.heads, kernels=False)
    stacks = fuse_experts(model, banks, dtype, settings.islands)
    clean(model)  # what experts alone read is gone
    stored = {value.name: value.const_value for value in model.graph.initializers.values() if is_weight(value)}
    convert_precision(model, TrtContext(name, settings.target, islands=settings.islands))
    fuse_norms(model)
    lift_constants(model)
    clean(model)
    for node in model.graph:
        node.metadata_props.pop(EXACT, None)
    weights.stacks |= stacks
    for key, value in model.graph.initializers.items():
        if is_weight(value) and not is_for_later(value):
            assert value.dtype is not None
            source = stored.get(key) or stored[key.rpartition(".")[0]]
            assert isinstance(source, ir.ExternalTensor)
            weights.plain[key] = Converted(source, value.dtype)
    attach_bodies(model)
    model.opset_imports[CONTRIB] = _VERSION
