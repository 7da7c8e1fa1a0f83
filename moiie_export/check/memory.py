"""Predicted memory of a run on a target, before anything is exported."""

from __future__ import annotations

from collections.abc import Iterable

from moiie_export.check.model_ops import StoredWeight
from moiie_export.families.family import DECODE, PREFILL
from moiie_export.model_config import ModelConfig, MoiieConfig
from moiie_export.targets import Target
from moiie_runtime.backends.device import ITEM_BYTES
from moiie_runtime.device_memory import (
    COPIES,
    DeviceEstimate,
    Form,
    decoder_work,
    encoder_work,
    kv_bytes,
    writes_scores,
)
from moiie_runtime.memory import EncoderShape

_PROCESS = 600 * 2**20
"""CUDA context, TensorRT and the interpreter: an assumption on the high side, not measured."""
_JETSON_SYSTEM = 1200 * 2**20
"""What the system itself is assumed to take of a memory that CPU and GPU share."""
_JETSON_SMS = frozenset({87, 110})


def predict_memory(
    config: ModelConfig, weights: Iterable[StoredWeight], target: Target, capacity: int
) -> DeviceEstimate:
    """The prediction for one request of the target's batch.

    Args:
        config: the model.
        weights: its parameters with how they are stored.
        target: what for.
        capacity: tokens of the key-value buffers.
    """
    sizes = dict.fromkeys(("vision", "prefill", "decode", "language_experts", "vision_experts"), 0)
    on_cpu = target.backend == "onnxruntime"
    once = target.backend.startswith("onnxruntime")  # a CPU maps the file, sessions on a GPU share what they read
    for weight in weights:
        size = stored_bytes(weight, target)
        if weight.expert and target.banks == "inputs":
            sizes["language_experts" if weight.decode else "vision_experts"] += size
            continue
        if PREFILL in weight.graphs:
            sizes["prefill"] += size
        if DECODE in weight.graphs and not (once and PREFILL in weight.graphs):
            sizes["decode"] += size
        sizes["vision"] += size if not weight.graphs & {PREFILL, DECODE} else 0
    item = ITEM_BYTES[target.kv_cache if on_cpu else target.precision]
    copies = COPIES if target.dialect == "trt10" and target.plugins != "required" else 1
    cache = copies * kv_bytes(config.text, target.batch, capacity, item)
    system = _PROCESS + (_JETSON_SYSTEM if _JETSON_SMS & set(target.sms) else 0)
    work = max(_decoder_work(config, target, capacity), _vision_work(config, target))
    return DeviceEstimate(**sizes, kv_cache=cache, workspace=work, system=system)


def stored_bytes(weight: StoredWeight, target: Target) -> int:
    """Bytes of a weight on the device, with its scales."""
    scheme = weight.form.scheme
    if scheme is None:
        plain = (
            4 if target.backend == "onnxruntime" and weight.form.format == "float32" else ITEM_BYTES[target.precision]
        )
        return weight.elements * plain
    scales = 2 * weight.elements // scheme.group_size if scheme.group_size else 4 * weight.shape[0]
    return weight.elements * scheme.bits // 8 + scales


def _decoder_work(config: ModelConfig, target: Target, capacity: int) -> int:
    dense = target.plugins != "required" and target.backend.startswith("tensorrt")
    form = Form(
        ITEM_BYTES[target.precision],
        batch=target.batch,
        tokens=min(max(target.prefill), capacity),
        capacity=capacity,
        scores=writes_scores(target.dialect),
        experts=0 if config.moe is None else config.moe.num_experts if dense else config.moe.top_k,
    )
    return decoder_work(config.text, config.text.intermediate_size, form)


def _vision_work(config: ModelConfig, target: Target) -> int:
    if not isinstance(config, MoiieConfig):
        return 256 * 2**20
    tower = config.vision
    tiles = target.images * (sum((scale // tower.image_size) ** 2 for scale in tower.scales) or 1)
    shape = EncoderShape(
        tiles, tower.image_tokens, tower.hidden_size, tower.num_attention_heads, tower.intermediate_size
    )
    return encoder_work(shape, ITEM_BYTES[target.precision], writes_scores(target.dialect))
