"""op x target -> how it is computed, on which GPUs, or why it is not.

What TensorRT for RTX takes was found by building with it. For TensorRT 10 and 11 nothing was built here: their rows say what
we expect, and the build on the device decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moiie_export.check.cuda_support import cuda_lowering
from moiie_export.check.model_ops import OpUse
from moiie_export.targets import OLDEST_SMS, Target, has_native_moe
from moiie_runtime.backends.gpu_info import runs_kernels

PLUGIN_SMS = frozenset({80, 86, 87, 89, 90, 100, 110, 120})
"""GPUs with compiled kernels, where the library is built for all of them."""
PLUGIN_PTX = frozenset({89})
"""Their PTX that is kept for others, which are newer."""

MAX_TOP_K, MAX_PLUGIN_EXPERTS, MAX_HEAD_DIM, MAX_PLUGIN_HEAD_DIM = 3840, 64, 256, 128
FLOAT32_OPS = frozenset({"router", "deformable_sample"})
"""Computed in float32 in every precision."""


@dataclass(frozen=True)
class Lowering:
    """What becomes of an op.

    Attributes:
        name: the form it takes.
        reason: why this form.
        oldest: lowest compute capability that has it.
        refused: why it has none at all; empty when it has.
    """

    name: str
    reason: str
    oldest: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """An op on a target. `sms`: those of its GPUs that support it; all when `supported`."""

    op: str
    where: str
    dtype: str
    shape: Mapping[str, int]
    lowering: str
    sms: tuple[int, ...]
    supported: bool
    reason: str


def judge(use: OpUse, target: Target) -> Row:
    """The row of an op on a target, whose library builds for all its GPUs (see devices.py)."""
    found = _lowering(use, target)
    sms = () if found.refused else tuple(sm for sm in target.sms if sm >= found.oldest)
    missing = [sm for sm in target.sms if sm not in sms]
    supported = not found.refused and not missing
    reason = found.refused or found.reason
    if missing and not found.refused:
        reason = f"not on SM {', '.join(map(str, missing))}: needs SM {found.oldest} or above"
    plain = "float32" if use.op in FLOAT32_OPS else target.precision
    dtype = plain if use.format == "plain" else use.format + (f" / {use.group_size}" if use.group_size else "")
    return Row(use.op, use.where, dtype, dict(use.shape), found.name, sms, supported, reason)


def _lowering(use: OpUse, target: Target) -> Lowering:
    if not target.sms or target.dialect in ("cpu", "cuda"):
        return _onnxruntime(use, target)
    return _TENSORRT[use.op](use, target)


def _onnxruntime(use: OpUse, target: Target) -> Lowering:
    if use.format in ("fp8", "w8a8"):
        if target.dialect == "cuda":
            return Lowering("-", "", refused=f"ONNX Runtime has no kernels for {use.format}: use int8 or int4")
        return Lowering("portable body", "multiplied out to float32 in every step: right, and slow")
    if target.dialect == "cuda":
        return Lowering(*cuda_lowering(use, target.precision))
    if use.format == "plain":
        return Lowering("portable graph", "standard ONNX, computed in float32" if not target.sms else "standard ONNX")
    return Lowering(
        "DequantizeLinear or a fused kernel", "the portable body runs anywhere; `moiie build` makes it fast"
    )


def _plain(name: str, reason: str) -> Callable[[OpUse, Target], Lowering]:
    return lambda _use, _target: Lowering(name, reason)


def _linear(use: OpUse, target: Target) -> Lowering:
    if use.format == "plain":
        return Lowering("MatMul", "native layer")
    if use.format == "int4":
        return Lowering("DequantizeLinear(int4) + MatMul", "weights stay in 4 bits in the engine", OLDEST_SMS["int4"])
    if use.format in ("int8", "fp8"):
        reason = "weights stay in 8 bits in the engine" if use.format == "int8" else "weights in E4M3, one scale a row"
        if target.dialect == "rtx":
            reason += f", which copies them to {target.precision} to multiply, a layer at a time"
        return Lowering(f"DequantizeLinear({use.format}) + MatMul", reason, OLDEST_SMS.get(use.format, 0))
    reason = "activations rounded with the calibrated scale"
    return Lowering("QuantizeLinear + MatMul(int8)", reason, OLDEST_SMS["w8a8"])


def _norm(_: OpUse, target: Target) -> Lowering:
    if target.dialect == "trt10":
        return Lowering("Mul, ReduceMean, Sqrt, Div in float32", "TensorRT 10.3 reads no opset 23")
    return Lowering("RMSNormalization", "native, sums in float32")


def _rotary(use: OpUse, target: Target) -> Lowering:
    if use.size("head_dim") % 2:
        return Lowering("-", "", refused=f"head size {use.size('head_dim')} is odd")
    if target.dialect == "trt10":
        return Lowering("Mul, Sub, Add, Concat in float32", "TensorRT 10.3 reads no opset 23")
    return Lowering("RotaryEmbedding", "native layer")


def _half_only(target: Target) -> str:
    wrong = target.dialect == "trt10" and target.plugins == "required" and target.precision != "float16"
    return f"our KV plugins compute in float16, the target asks for {target.precision}" if wrong else ""


def _kv_update(_: OpUse, target: Target) -> Lowering:
    if target.dialect != "trt10":
        return Lowering("TRT_KVCacheUpdate", "native, in place")
    if target.plugins == "required":
        return Lowering("plugin KVCacheUpdate", "in place", refused=_half_only(target))
    return Lowering("ScatterND", "standard op; copies the buffers in every step, plugins: required does not")


def _prefill_attention(use: OpUse, target: Target) -> Lowering:
    if use.size("head_dim") > MAX_HEAD_DIM:
        return Lowering("-", "", refused=f"head size {use.size('head_dim')}: at most {MAX_HEAD_DIM}")
    if target.dialect == "trt10":
        return Lowering("MatMul, mask, Softmax", "TensorRT 10.3 has no attention layer; the query is scaled")
    return _native_attention(use)


def _native_attention(use: OpUse) -> Lowering:
    window = use.size("window")
    if 0 < window < use.size("capacity"):
        return Lowering(
            "TRT_Attention, mask", f"context {use.size('capacity')} is longer than the window of {window} keys"
        )
    return Lowering("TRT_Attention, lower_right", "causal, aligned to the newest key")


def _decode_attention(use: OpUse, target: Target) -> Lowering:
    if target.dialect == "trt10" and target.plugins == "required":
        size = use.size("head_dim")
        wide = f"head size {size}: the plugin DecodeAttention takes at most {MAX_PLUGIN_HEAD_DIM}"
        refused = wide if size > MAX_PLUGIN_HEAD_DIM else _half_only(target)
        return Lowering("plugin DecodeAttention", "one pass over the keys", refused=refused)
    return _prefill_attention(use, target)


def _encoder_attention(_: OpUse, target: Target) -> Lowering:
    if target.dialect == "trt10":
        return Lowering("MatMul, Softmax", "TensorRT 10.3 has no attention layer; the query is scaled")
    return Lowering("TRT_Attention", "native layer; the query is scaled")


def _router(use: OpUse, _: Target) -> Lowering:
    if use.size("top_k") > MAX_TOP_K:
        return Lowering("-", "", refused=f"top_k {use.size('top_k')}: TensorRT's TopK takes at most {MAX_TOP_K}")
    return Lowering("Gemm, Softmax, TopK in float32", "native layers; half precision would change routes")


def _experts(use: OpUse, target: Target) -> Lowering:
    refused = _refused_experts(use, target)
    if refused:
        return Lowering("-", "", refused=refused)
    if has_native_moe(target) and use.format == "plain":
        return Lowering("TRT_MoE", "native layer; never built here")
    if target.plugins != "required":
        return _dense_experts(use, target)
    if use.format == "plain":
        return Lowering("plugin ExpertDispatch", "reads only the experts that are routed to")
    if use.format == "fp8":
        reason = "converts E4M3 in the kernel, reads only what is routed to"
        return Lowering("plugin Fp8ExpertDispatch", reason, OLDEST_SMS["fp8"])
    return Lowering("plugin QuantizedExpertDispatch", "dequantises in the kernel, reads only what is routed to", 80)


def _dense_experts(use: OpUse, target: Target) -> Lowering:
    reason = "every expert for every token: right, and slow"
    if target.plugins == "optional":
        reason += "; with --plugins the plugin"
    if use.format != "plain":
        kept = use.format == "int4" and target.banks == "constants"
        reason += (
            "; multiplied out in the product"
            if kept
            else f"; a layer at a time is multiplied out to {target.precision}"
        )
    return Lowering("dense body", reason, OLDEST_SMS.get(use.format, 0))


def _refused_experts(use: OpUse, target: Target) -> str:
    """Why there is no form for these experts; empty when there is one."""
    if use.format == "w8a8":
        return "experts have no w8a8 form, in which their activations would be rounded: use fp8, int8 or int4"
    if target.plugins != "required":
        return ""
    if use.size("experts") > MAX_PLUGIN_EXPERTS:
        return f"{use.size('experts')} experts: the plugin takes at most {MAX_PLUGIN_EXPERTS}"
    lost = [sm for sm in target.sms if not runs_kernels(sm, PLUGIN_SMS, PLUGIN_PTX)]
    return f"the plugin library has no kernels for SM {', '.join(map(str, lost))}" if lost else ""


_TENSORRT: Mapping[str, Callable[[OpUse, Target], Lowering]] = {
    "linear": _linear,
    "rms_norm": _norm,
    "rotary": _rotary,
    "kv_update": _kv_update,
    "prefill_attention": _prefill_attention,
    "decode_attention": _decode_attention,
    "encoder_attention": _encoder_attention,
    "router": _router,
    "experts": _experts,
    "resize": _plain("Resize", "cubic, without antialiasing"),
    "deformable_sample": _plain("Gather, Mul, MatMul in float32", "coordinates need float32; never GridSample"),
    "adapter": _plain("MatMul, Relu, MatMul", "the adapters of a request are inputs"),
    "sentence": _plain("TRT_Attention or MatMul, LayerNormalization", "runs once a request"),
}
"""Kind of op -> its lowering on TensorRT."""
