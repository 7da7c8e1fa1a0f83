"""Predicted memory of a run on a target, before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence

from moiie_export.check.model_ops import StoredWeight
from moiie_export.families.family import DECODE, PREFILL
from moiie_export.model_config import ModelConfig, MoiieConfig
from moiie_export.mome_config import MomeConfig, Pix2StructConfig, VisionExpert
from moiie_export.targets import Target
from moiie_runtime.backends.device import ITEM_BYTES
from moiie_runtime.device_copies import copied_numbers
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
_ROUTER = "router"
"""Component that chooses experts by the instruction."""
_JETSON_SMS = frozenset({87, 110})


def predict_memory(
    config: ModelConfig, weights: Sequence[StoredWeight], target: Target, capacity: int
) -> DeviceEstimate:
    """The prediction for one request of the target's batch.

    Args:
        config: the model.
        weights: its parameters with how they are stored.
        target: what for.
        capacity: tokens of the key-value buffers.
    """
    sizes = dict.fromkeys(("vision", "router", "prefill", "decode", "language_experts", "vision_experts"), 0)
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
        if not weight.graphs & {PREFILL, DECODE}:
            sizes["router" if weight.graphs == {_ROUTER} else "vision"] += size
    item = ITEM_BYTES[target.kv_cache if on_cpu else target.precision]
    copies = COPIES if target.dialect == "trt10" and target.plugins != "required" else 1
    cache = copies * kv_bytes(config.text, target.batch, capacity, item)
    system = _PROCESS + (_JETSON_SYSTEM if _JETSON_SMS & set(target.sms) else 0)
    work = [_decoder_work(config, target, capacity) + _copies(weights, target, PREFILL)]
    work += [_vision_work(config, target) + _copies(weights, target, graph) for graph in _encoders(weights)]
    feeds = _feeds(config, target, capacity, item)
    return DeviceEstimate(**sizes, kv_cache=cache, inputs_and_outputs=feeds, workspace=max(work), system=system)


def _encoders(weights: Sequence[StoredWeight]) -> set[str]:
    graphs = {graph for weight in weights for graph in weight.graphs}
    return graphs - {PREFILL, DECODE, _ROUTER}


def _copies(weights: Sequence[StoredWeight], target: Target, graph: str) -> int:
    """Bytes of weights that a TensorRT engine multiplies out of those of a graph."""
    if not target.backend.startswith("tensorrt"):
        return 0
    stored = [
        (weight.name, weight.form.format, weight.elements)
        for weight in weights
        if weight.form.scheme is not None and graph in weight.graphs
    ]
    return ITEM_BYTES[target.precision] * copied_numbers(stored, target.dialect, target.plugins, target.banks)


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


def _feeds(config: ModelConfig, target: Target, capacity: int, item: int) -> int:
    """What a prompt and a step are fed and give back; see moiie_runtime.device_feeds, which knows the built graphs."""
    text, rows = config.text, target.batch
    tokens = min(max(target.prefill), capacity)
    total = rows * (tokens + 1) * (text.hidden_size * item + 8) + 2 * rows * text.vocab_size * 4
    total += target.images * item * (3 * _pixels(config) + config.image_tokens * text.hidden_size)
    if isinstance(config, MomeConfig):
        adapter = 2 * config.mole.bottleneck * text.hidden_size + config.mole.bottleneck + text.hidden_size + 1
        total += 2 * rows * len(config.mole.layers) * adapter * item  # once for each decoder graph
    return total


def _pixels(config: ModelConfig) -> int:
    """Of a picture as the encoders are fed with it, all of them together."""
    if isinstance(config, MomeConfig):
        towers = [each.tower for each in config.experts]
        return sum(
            each.max_patches * (each.patch_size**2 + config.queries)
            if isinstance(each, Pix2StructConfig)
            else each.image_size**2
            for each in towers
        )
    return max(config.vision.scales or (config.vision.image_size,)) ** 2 if isinstance(config, MoiieConfig) else 0


def _vision_work(config: ModelConfig, target: Target) -> int:
    item, scores = ITEM_BYTES[target.precision], writes_scores(target.dialect)
    if isinstance(config, MomeConfig):
        return max(encoder_work(_expert_shape(each, config), item, scores) for each in config.experts)
    if not isinstance(config, MoiieConfig):
        return 0
    tower = config.vision
    tiles = target.images * (sum((scale // tower.image_size) ** 2 for scale in tower.scales) or 1)
    shape = EncoderShape(
        tiles, tower.image_tokens, tower.hidden_size, tower.num_attention_heads, tower.intermediate_size
    )
    return encoder_work(shape, item, scores)


def _expert_shape(expert: VisionExpert, config: MomeConfig) -> EncoderShape:
    """One of MoME's encoders: its tower, and the wider layers that bring it to the decoder's width."""
    tower, adt = expert.tower, expert.adt
    patches = isinstance(tower, Pix2StructConfig)
    tokens = tower.max_patches if isinstance(tower, Pix2StructConfig) else tower.grid**2 + 1
    inner = tower.d_ff if isinstance(tower, Pix2StructConfig) else tower.intermediate_size
    widest = max(inner * (2 if patches else 1), config.text.hidden_size, 0 if adt is None else adt.ffn_dim)
    return EncoderShape(1, tokens, tower.hidden_size, tower.num_attention_heads, widest)
