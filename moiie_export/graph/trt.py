"""TensorRT dialects: ordered passes that turn a graph of a bundle into one that a TensorRT parser takes.

`trt11` and `rtx` use the native layers TRT_KVCacheUpdate and TRT_Attention beside ONNX's RotaryEmbedding and
RMSNormalization. `trt10` has standard ops of opset 20 and our plugins; TensorRT 10.3 itself never parsed it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from moiie_export.graph.rewriting import clean
from moiie_export.graph.trt_attention import lower_cached_attention
from moiie_export.graph.trt_context import EXACT, TrtContext
from moiie_export.graph.trt_dense_experts import attach_dense_body
from moiie_export.graph.trt_experts import lower_experts
from moiie_export.graph.trt_inline import inline_bodies
from moiie_export.graph.trt_moe import lower_native_moe
from moiie_export.graph.trt_precision import convert_precision
from moiie_export.graph.trt_prepare import lift_constants, prepare
from moiie_export.graph.trt_quantized import lower_quantized_linear
from moiie_export.graph.trt_rules import TRT10_INT4_OPSET, TRT10_IR_VERSION, TRT10_OPSET, check_rules
from moiie_export.graph.trt_standard import (
    compare_truths,
    lower_encoder_attention,
    lower_to_standard,
    strip_defaults,
)
from moiie_export.ops import DOMAIN

Pass = Callable[[ir.Model, TrtContext], None]


@dataclass(frozen=True)
class Sizes:
    """Where the weights of a graph end up."""

    constants: int
    inputs: int


def finish(model: ir.Model, context: TrtContext) -> None:
    """Drop inputs that nothing reads, remove marks, name the graph, and declare the opsets that are used."""
    lift_constants(model)
    clean(model)
    for value in [each for each in model.graph.inputs if not each.uses()]:
        model.graph.inputs.remove(value)
    for node in model.graph:
        node.metadata_props.pop(EXACT, None)
    model.graph.name = context.component
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    domains = {node.domain for node in model.graph}
    for domain in [each for each in model.opset_imports if each and each not in domains]:
        del model.opset_imports[domain]
    if DOMAIN in domains:
        model.opset_imports[DOMAIN] = 1


def use_old_opset(model: ir.Model, context: TrtContext) -> None:
    """opset 20, or 21 where weights are dequantised in blocks."""
    blocks = any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in model.graph)
    model.opset_imports[""] = TRT10_INT4_OPSET if blocks else TRT10_OPSET
    model.ir_version = TRT10_IR_VERSION


_FIRST: tuple[Pass, ...] = (
    *(prepare, strip_defaults, compare_truths),
    *(lower_quantized_linear, lower_cached_attention, lower_experts),
)
_LAST: tuple[Pass, ...] = (convert_precision, attach_dense_body, inline_bodies, finish)
DIALECTS: dict[str, tuple[Pass, ...]] = {
    "rtx": (*_FIRST, lower_encoder_attention, *_LAST, check_rules),
    "trt11": (*_FIRST, lower_native_moe, lower_encoder_attention, *_LAST, check_rules),
    "trt10": (*_FIRST, lower_to_standard, *_LAST, use_old_opset, check_rules),
}
"""dialect -> its passes, in order."""


def lower(path: Path, context: TrtContext) -> ir.Model:
    """The graph at `path` in the target's dialect and precision; weights are read when it is saved.

    Args:
        path: an ONNX file of a bundle, its weights beside it.
        context: what it is for; the passes write banks, aliases and the kind of attention into it.

    Raises:
        MoiieError: the graph holds something that the dialect has no form for.
    """
    model = ir.load(path)
    for each in DIALECTS[context.target.dialect]:
        each(model, context)
    return model


def weight_sizes(model: ir.Model, context: TrtContext) -> Sizes:
    """Bytes of constants and of experts that are bound as inputs."""
    banks = {name for bank in context.banks for name in bank.tensors}
    constants = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    inputs = sum(_bytes(value) for value in model.graph.inputs if value.name in banks)
    return Sizes(constants, inputs)


def _bytes(value: ir.Value) -> int:
    assert value.shape is not None
    assert value.dtype is not None
    count = 1
    for dim in value.shape:
        assert isinstance(dim, int)
        count *= dim
    return count * value.dtype.bitwidth // 8
