"""Predicted memory of a GPU: before a model is exported (`moiie check`), and of a built form before it is loaded.

The weights, banks and buffers of a built form are known to the byte; what its graphs work with is a formula that leans to
the high side, and none of it was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from moiie_runtime.backends.device import ITEM_BYTES, Device
from moiie_runtime.backends.expert_banks import DECODE
from moiie_runtime.device_copies import copied_numbers
from moiie_runtime.device_feeds import feed_bytes
from moiie_runtime.engines import Engine
from moiie_runtime.errors import MoiieError
from moiie_runtime.jetson import shared_memory
from moiie_runtime.kv_cache import static_rows
from moiie_runtime.memory import SMALLEST, EncoderShape, Request, encoder_shapes, once_components, widest_output
from moiie_runtime.quantized_weights import FORMATS
from moiie_runtime.residency import stored_tensor
from moiie_runtime.sizes import readable
from moiie_runtime.tensors import TensorFile, TensorInfo

COPIES = 3
"""The key-value cache, and as much again for the outputs of prefill and of decode where they cannot be written over it."""


@dataclass(frozen=True)
class DeviceEstimate:
    """Bytes at the peak, which is while a prompt with a picture is read, and while the answer is written.

    Attributes:
        vision: weights of the vision encoders.
        router: weights of the graph that chooses experts by the instruction.
        prefill, decode: weights stored in the two decoder engines.
        language_experts, vision_experts: expert weights, by whether a decode step can reach them.
        kv_cache: key-value buffers.
        inputs_and_outputs: what graphs are fed and give back, adapters of the request among it.
        workspace: intermediate results of the largest graph.
        system: contexts, libraries, and on a Jetson the operating system; 0 where they are there already.
    """

    vision: int
    router: int
    prefill: int
    decode: int
    language_experts: int
    vision_experts: int
    kv_cache: int
    inputs_and_outputs: int
    workspace: int
    system: int

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(getattr(self, each.name) for each in fields(self))

    def answering(self, after_prefill: bool) -> int:
        """While tokens are written: without what was released."""
        return self.peak - (self.vision + self.vision_experts if after_prefill else 0)

    @property
    def total(self) -> int:
        """The peak."""
        return self.peak

    @property
    def fixes(self) -> list[str]:
        """What would make it smaller."""
        return [
            "end other programs on the GPU",
            "export with int8 or int4 weights, or a smaller max_context",
            "build with smaller prefill profiles",
            "if the prediction is wrong, say what it may take with memory_limit (--memory-limit)",
        ]

    def __str__(self) -> str:
        parts = [
            f"{each.name.replace('_', ' ')} {readable(size)}"
            for each in fields(self)
            if (size := getattr(self, each.name))
        ]
        return f"{readable(self.peak)} on the GPU ({', '.join(parts)})"


class DecoderSizes(Protocol):
    """What a decoder's buffers depend on; configs of checkpoints and manifests of bundles both say it."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""

    @property
    def hidden_size(self) -> int:
        """Width of a token."""

    @property
    def num_attention_heads(self) -> int:
        """Heads of queries."""

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def vocab_size(self) -> int:
        """Tokens there are."""


@dataclass(frozen=True)
class Form:
    """How a target runs a model.

    Attributes:
        item: bytes of an activation.
        batch: rows.
        tokens: of a prompt that go through a decoder at once.
        capacity: tokens of the key-value buffers.
        scores: attention scores are written out, not kept inside a fused kernel.
        experts: of a sparse layer that a token goes through, all of them where they are computed densely; 0: none.
    """

    item: int
    batch: int
    tokens: int
    capacity: int
    scores: bool
    experts: int


def writes_scores(dialect: str) -> bool:
    """Whether a dialect computes attention with standard layers."""
    return dialect in ("trt10", "cpu", "cuda")


def kv_bytes(sizes: DecoderSizes, rows: int, capacity: int, item: int) -> int:
    """Key-value buffers of all layers."""
    return 2 * sizes.num_hidden_layers * rows * capacity * sizes.num_key_value_heads * sizes.head_dim * item


def decoder_work(sizes: DecoderSizes, intermediate: int, form: Form) -> int:
    """Projections, feed-forward, scores where they are written out, and logits, for one prefill step."""
    rows, item = form.batch * form.tokens, form.item
    heads = (sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * sizes.head_dim
    total = rows * item * (6 * sizes.hidden_size + 2 * heads + 4 * intermediate)
    if form.scores:
        total += rows * form.capacity * sizes.num_attention_heads * (item + 4)
    total += rows * form.experts * item * (3 * intermediate + 2 * sizes.hidden_size)
    return total + form.batch * sizes.vocab_size * 4


def encoder_work(shape: EncoderShape, item: int, scores: bool) -> int:
    """The tower's widest layer; scores where they are written out."""
    rows = shape.tiles * shape.tokens
    total = rows * item * (6 * shape.hidden + 2 * shape.widest)
    return total + (rows * shape.tokens * shape.heads * (item + 4) if scores else 0)


def estimate_device(engine: Engine, request: Request = SMALLEST) -> DeviceEstimate:
    """The predicted peak of one request to a built form; by default of the smallest one.

    Contexts and libraries are left out: they are there when anyone asks how much is free.

    Args:
        engine: a built form that runs on a device.
        request: what would be asked.
    """
    bundle, settings = engine.bundle, engine.document.get("settings") or {}
    rows = static_rows(bundle)
    capacity = bundle.kv_cache.capacity
    buffers = kv_bytes(
        bundle.model, rows or request.batch * request.num_beams, capacity, ITEM_BYTES[bundle.kv_cache.dtype]
    )
    if request.num_beams > 1:  # beams that change places take a spare row of one buffer
        buffers += buffers // (2 * bundle.model.num_hidden_layers * (rows or request.batch * request.num_beams))
    in_place = (engine.document.get("kv_cache") or {}).get("in_place", True)
    return DeviceEstimate(
        **_weights(engine, request),
        kv_cache=buffers * (1 if in_place else COPIES),
        inputs_and_outputs=feed_bytes(engine, request),
        workspace=_work(engine, settings, request, rows),
        system=0,
    )


def free_memory(device: Device) -> int:
    """Bytes that could still be taken; on a Jetson also what the system would give back."""
    shared = shared_memory()
    return max(device.memory().free, 0 if shared is None else shared.available)


def _weights(engine: Engine, request: Request) -> dict[str, int]:
    """What is stored in engines or their weights file, and the banks beside them."""
    bundle = engine.bundle
    once = once_components(bundle, request)
    header = TensorFile(bundle.path(bundle.weights_file)).header
    if engine.backend.startswith("tensorrt"):
        sizes = {name: bundle.files[bundle.components[name].file].bytes for name in bundle.phases}
        stored = {"prefill": sizes["decoder_prefill"], "decode": sizes[DECODE]}
        before = {name: sizes[name] for name in once}
    else:  # sessions share what they read
        used = {phase: {*bundle.residency[phase].weights} & {*header} for phase in bundle.phases.values()}
        stored = {
            "prefill": _bytes(header, used["prefill"]),
            "decode": _bytes(header, used["decode"] - used["prefill"]),
        }
        before = {name: _bytes(header, used[bundle.phases[name]]) for name in once}
    banks = {"language_experts": 0, "vision_experts": 0}
    for bank in engine.document.get("banks") or ():
        kind = "language_experts" if DECODE in bank["components"] else "vision_experts"
        banks[kind] += _bytes(header, {*bank["inputs"]})
    encoders = {encoder.component for encoder in bundle.encoders}
    vision = sum(size for name, size in before.items() if name in encoders)
    return {"vision": vision, "router": sum(before.values()) - vision, **stored, **banks}


def _bytes(header: Mapping[str, Any], names: set[str]) -> int:
    missing = sorted(names - {*header})
    if missing:
        raise MoiieError(
            f"the weights of an engine lack the tensor {missing[0]}", "build it again with `moiie build --force`"
        )
    return sum(header[name].nbytes for name in names)


def _work(engine: Engine, settings: Mapping[str, Any], request: Request, rows: int | None) -> int:
    bundle = engine.bundle
    item = ITEM_BYTES[settings.get("precision", "float16")]
    scores, moe = writes_scores(settings.get("dialect", "cuda")), bundle.model.moe
    dense = engine.backend.startswith("tensorrt") and settings.get("plugins") != "required"
    chunk = bundle.prefill_chunk or bundle.kv_cache.capacity
    form = Form(
        item,
        batch=rows or 1,  # without fixed rows long prompts go through row by row
        tokens=chunk if rows else min(chunk, request.prompt_tokens),
        capacity=bundle.kv_cache.capacity if rows else request.prompt_tokens,
        scores=scores,
        experts=0 if moe is None else moe.num_experts if dense else moe.top_k,
    )
    source = engine.portable  # its weights have the shapes of the model
    header = TensorFile(source.path(source.embed_tokens.file)).header
    widest = widest_output(header, source.residency["prefill"].weights, bundle.model.vocab_size)
    pictures = int(settings.get("images", 1))
    shapes = encoder_shapes(source, header) if request.images else []
    encoders = [encoder_work(replace(each, tiles=each.tiles * pictures), item, scores) for each in shapes]
    decoder = decoder_work(bundle.model, widest // 2, form)  # rows are [gate | up]
    copies = {name: _copies(engine, settings, header, phase) * item for name, phase in source.phases.items()}
    largest = max((copies[each.component] for each in source.encoders), default=0)
    return max(decoder + copies["decoder_prefill"], *(each + largest for each in encoders), 0)


def _copies(engine: Engine, settings: Mapping[str, Any], header: Mapping[str, TensorInfo], phase: str) -> int:
    """Numbers that the engine of a phase multiplies out; other backends than TensorRT make no copies of them."""
    if not engine.backend.startswith("tensorrt"):
        return 0
    stored, source = [], engine.portable
    for name in source.residency[phase].weights:
        found = stored_tensor(header, name)
        form = None if found is None else source.quantization.get(found[0].name)
        if found is not None and form is not None:
            stored.append((name, form, found[0].nbytes // found[1] * FORMATS[form]))
    return copied_numbers(stored, *(str(settings.get(key, "")) for key in ("dialect", "plugins", "banks")))
