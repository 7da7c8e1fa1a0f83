"""op -> how ONNX Runtime computes it on an NVIDIA GPU. Known from its documentation; nothing of this ran on a GPU here."""

from __future__ import annotations

from moiie_export.check.model_ops import OpUse

_LARGEST_HEAD, _HEAD_STEP, _EXPERT_STEP, _SMALLEST_EXPERT = 256, 16, 8, 16


def cuda_lowering(use: OpUse, precision: str) -> tuple[str, str]:
    """The form of an op whose weights ONNX Runtime has kernels for, and why it is that."""
    if use.op in ("prefill_attention", "decode_attention"):
        return _attention(use, precision)
    if use.op == "kv_update":
        fused = _attention(use, precision)[0] == "GroupQueryAttention"
        return "in GroupQueryAttention" if fused else "ScatterND", "in place, buffers on the GPU"
    if use.op == "rms_norm":
        return "SkipSimplifiedLayerNormalization", "adds the residual in the same pass"
    if use.op == "experts" and use.format == "plain":
        return _experts(use)
    if use.op in ("experts", "linear") and use.format != "plain":
        return "MatMulNBits", f"dequantises while it multiplies; activations stay {precision}"
    exact = use.op in ("router", "deformable_sample")
    return "standard ONNX", "float32 in every precision" if exact else "has a kernel, or is taken apart"


def _attention(use: OpUse, precision: str) -> tuple[str, str]:
    size = use.size("head_dim")
    if precision != "float16":
        return "ScatterND, Attention", "GroupQueryAttention has no float32 kernel"
    if size % _HEAD_STEP or size > _LARGEST_HEAD:
        return "ScatterND, Attention", f"GroupQueryAttention does not rotate heads of {size}"
    return "GroupQueryAttention", "rotates, writes the cache and attends in one kernel"


def _experts(use: OpUse) -> tuple[str, str]:
    sizes = use.size("hidden"), use.size("intermediate")
    if any(size % _EXPERT_STEP or size < _SMALLEST_EXPERT for size in sizes):
        return "loop over experts", f"MoE takes sizes that are multiples of {_EXPERT_STEP}, from {_SMALLEST_EXPERT}"
    return "MoE", "one grouped product; needs ONNX Runtime 1.27"
