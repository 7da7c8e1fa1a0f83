"""Predicted memory of a run on a target, before anything is exported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from moiie_export.check.model_ops import StoredWeight
from moiie_export.families.family import DECODE, PREFILL
from moiie_export.model_config import ModelConfig, MoiieConfig
from moiie_export.targets import Target

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PROCESS = 600 * 2**20
"""CUDA context, TensorRT and the interpreter: an assumption on the high side, not measured."""
_JETSON_SYSTEM = 1200 * 2**20
"""What the system itself is assumed to take of a memory that CPU and GPU share."""
_JETSON_SMS = frozenset({87, 110})


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes at the peak, which is while a prompt with a picture is read, and while the answer is written.

    Attributes:
        vision: weights of the vision encoders.
        prefill, decode: weights stored in the two decoder engines.
        language_experts, vision_experts: expert weights, by whether a decode step can reach them.
        kv_cache: key-value buffers.
        workspace: intermediate results of the largest graph.
        system: contexts, libraries, and on a Jetson the operating system.
    """

    vision: int
    prefill: int
    decode: int
    language_experts: int
    vision_experts: int
    kv_cache: int
    workspace: int
    system: int

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(getattr(self, each.name) for each in fields(self))

    def answering(self, after_prefill: bool) -> int:
        """While tokens are written: without what was released."""
        return self.peak - (self.vision + self.vision_experts if after_prefill else 0)


def predict_memory(config: ModelConfig, weights: Iterable[StoredWeight], target: Target, capacity: int) -> DeviceMemory:
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
    text = config.text
    item = _BYTES[target.kv_cache if on_cpu else target.precision]
    copies = 2 if target.dialect == "trt10" and target.plugins != "required" else 1
    cache = (
        2 * text.num_hidden_layers * capacity * text.num_key_value_heads * text.head_dim * item * target.batch * copies
    )
    system = _PROCESS + (_JETSON_SYSTEM if _JETSON_SMS & set(target.sms) else 0)
    work = max(_decoder_work(config, target, capacity), _vision_work(config, target))
    return DeviceMemory(**sizes, kv_cache=cache, workspace=work, system=system)


def stored_bytes(weight: StoredWeight, target: Target) -> int:
    """Bytes of a weight on the device, with its scales."""
    scheme = weight.form.scheme
    if scheme is None:
        plain = 4 if target.backend == "onnxruntime" and weight.form.format == "float32" else _BYTES[target.precision]
        return weight.elements * plain
    scales = 2 * weight.elements // scheme.group_size if scheme.group_size else 4 * weight.shape[0]
    return weight.elements * scheme.bits // 8 + scales


def _decoder_work(config: ModelConfig, target: Target, capacity: int) -> int:
    """Projections, feed-forward, scores where they are written out, and logits, for one prefill step."""
    text = config.text
    item = _BYTES[target.precision]
    rows = target.batch * min(max(target.prefill), capacity)
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    total = rows * item * (6 * text.hidden_size + 2 * heads + 4 * text.intermediate_size)
    if target.dialect in ("trt10", "cpu", "cuda"):
        total += rows * capacity * text.num_attention_heads * (item + 4)
    if config.moe is not None:
        dense = target.plugins != "required" and target.backend.startswith("tensorrt")
        copies = config.moe.num_experts if dense else config.moe.top_k
        total += rows * copies * item * (3 * text.intermediate_size + 2 * text.hidden_size)
    return total + target.batch * text.vocab_size * 4


def _vision_work(config: ModelConfig, target: Target) -> int:
    """The tower's widest layer; scores where they are written out."""
    if not isinstance(config, MoiieConfig):
        return 256 * 2**20
    tower, item = config.vision, _BYTES[target.precision]
    tiles = target.images * (sum((scale // tower.image_size) ** 2 for scale in tower.scales) or 1)
    rows = tiles * tower.image_tokens
    total = rows * item * (6 * tower.hidden_size + 2 * tower.intermediate_size)
    if target.dialect in ("trt10", "cpu", "cuda"):
        total += rows * tower.image_tokens * tower.num_attention_heads * (item + 4)
    return total
