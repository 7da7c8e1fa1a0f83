"""Predicted memory of a request, and the limit that refuses it before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from moiie_runtime.adapters import BANKS
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency
from moiie_runtime.quantized_weights import Unpacking, unpacking
from moiie_runtime.residency import weight_views
from moiie_runtime.sizes import readable
from moiie_runtime.tensors import TensorFile, TensorInfo
from moiie_runtime.vision_settings import Encoder, PatchSettings

_FLOAT32 = 4
_COPY = 2.15  # float32 for float16, and what the allocator adds (measured)
_PROCESS = 100 * 2**20  # Python, numpy, ONNX Runtime and the tokenizer without a model


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a request is predicted to take at its peak.

    Attributes:
        weights: pages of the weight file that are used. They are mapped: the system can take them back. float16
            weights are read once, into the copies.
        copies: float32 copies that ONNX Runtime makes of float16 weights, for each graph of its own.
        kv_cache: the part of the buffers that prompt and answer fill.
        activations: intermediate results of the largest graph.
        logits: of all positions that are kept.
        pictures: decoded pixels, and features that are kept for later questions.
        process: the interpreter and its libraries.
    """

    weights: int
    copies: int
    kv_cache: int
    activations: int
    logits: int
    pictures: int = 0
    process: int = _PROCESS

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def fixes(self) -> list[str]:
        """What would make it smaller."""
        copied = ["export with dtype float32, which needs no copies of the weights on a CPU"] * bool(self.copies)
        return [
            *copied,
            "use a shorter prompt, fewer new tokens, fewer beams or a smaller batch",
            "give it more memory",
        ]

    def __str__(self) -> str:
        parts = [f"{field.name.replace('_', ' ')} {readable(getattr(self, field.name))}" for field in fields(self)]
        return f"{readable(self.total)} ({', '.join(parts)})"


@dataclass(frozen=True)
class Request:
    """The size of a request.

    Attributes:
        batch: rows of the prefill.
        prompt_tokens: positions of the longest prompt.
        new_tokens: tokens of the longest answer.
        images: pictures in all prompts; 0 when no vision encoder runs.
        all_logits: whether the logits of every prompt position are kept.
        num_beams: rows that each of the prefill becomes.
        picture_bytes: decoded pixels of the pictures.
        feature_bytes: features kept of pictures of earlier requests.
    """

    batch: int = 1
    prompt_tokens: int = 1
    new_tokens: int = 1
    images: int = 0
    all_logits: bool = False
    num_beams: int = 1
    picture_bytes: int = 0
    feature_bytes: int = 0


SMALLEST = Request()


def estimate_memory(bundle: Bundle, request: Request = SMALLEST) -> MemoryEstimate:
    """The predicted peak of one request; by default of the smallest one.

    The formulas were fitted to measurements with ONNX Runtime on a CPU and lean to the high side.

    Args:
        bundle: gives the sizes; only the header of its weight file is read.
        request: what would be asked.
    """
    model = bundle.model
    header = TensorFile(bundle.path(bundle.embed_tokens.file)).header
    prefill, decode = bundle.residency["prefill"].bytes, bundle.residency["decode"].bytes
    once = _once_bytes(bundle, request)
    in_place = bundle.weights_file != bundle.embed_tokens.file  # a built form: weights as its graphs want them
    copied = bundle.dtype == "float16" and not in_place
    activations = _decoder_activations(bundle, header, request)
    if request.images:
        activations = max(activations, _vision_activations(bundle, header))
    rows = request.batch * request.num_beams
    positions = rows * min(request.prompt_tokens + request.new_tokens, bundle.kv_cache.capacity)
    kept = max(rows, request.batch * request.prompt_tokens if request.all_logits else 0)
    adapters = _adapter_bytes(bundle, request)
    unpacked = [] if in_place else _unpacked(bundle, header, request)
    halves = sum(graph.half for graph in unpacked) if unpacked else once + prefill + decode
    mapped = request.batch == 1 and not copied  # a single float32 choice is used where it lies
    features = request.images * sum(encoder.tokens for encoder in bundle.encoders) * model.hidden_size * _FLOAT32
    return MemoryEstimate(
        # Decode uses a part of what prefill uses.
        weights=0 if copied and not unpacked else once + max(prefill, decode) + (adapters if mapped else 0),
        copies=(int(_COPY * halves) if copied or unpacked else 0) + (0 if mapped else adapters),
        kv_cache=2
        * model.num_hidden_layers
        * positions
        * model.num_key_value_heads
        * model.head_dim
        * _size_of_key(bundle),
        activations=activations + sum(graph.floats for graph in unpacked),
        logits=kept * model.vocab_size * _FLOAT32,
        pictures=request.picture_bytes + request.feature_bytes + features,
    )


class Prediction(Protocol):
    """What is predicted of a request, on the host or on a device."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""

    @property
    def fixes(self) -> list[str]:
        """What would make it smaller."""


def check_memory(estimate: Prediction, limit: int | None, bundle: Bundle, *, what: str = "the limit") -> None:
    """Refuse what is predicted to exceed the limit.

    Args:
        estimate: the prediction.
        limit: bytes; None for no limit.
        bundle: for the message.
        what: whose limit it is, for the message.

    Raises:
        MissingDependency: with the prediction, the limit, and what would make it smaller.
    """
    if limit is not None and estimate.total > limit:
        raise MissingDependency(
            f"{bundle.name}: predicted memory {estimate} exceeds {what} of {readable(limit)}",
            "; or ".join(estimate.fixes),
        )


def _decoder_activations(bundle: Bundle, header: Mapping[str, TensorInfo], request: Request) -> int:
    """Attention scores and masks of one layer over the prompt, its projections, and the widest feed-forward."""
    model, tokens, rows = bundle.model, request.prompt_tokens, request.batch
    if bundle.prefill_chunk is not None and tokens > bundle.prefill_chunk:
        tokens, rows = bundle.prefill_chunk, 1  # long prompts go through in pieces, row by row
    scores = rows * tokens * request.prompt_tokens * (model.num_attention_heads + 2)
    widest = widest_output(header, bundle.residency["prefill"].weights, model.vocab_size)
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    return _FLOAT32 * (scores + rows * tokens * (6 * model.hidden_size + 2 * heads + 2 * widest))


def _size_of_key(bundle: Bundle) -> int:
    """Bytes of a number in the key and value buffers."""
    return _FLOAT32 if bundle.kv_cache.dtype == "float32" else 2


def _unpacked(bundle: Bundle, header: Mapping[str, TensorInfo], request: Request) -> list[Unpacking]:
    """What each graph takes for multiplying quantised weights out; nothing when no weight is quantised."""
    if not bundle.quantization:
        return []
    phases = ["prefill", "decode", *once_components(bundle, request)]
    return [unpacking(header, bundle.residency[phase].weights, bundle.quantization) for phase in phases]


def _once_bytes(bundle: Bundle, request: Request) -> int:
    """Stored weights of the graphs that run once before the prefill."""
    return sum(bundle.residency[component].bytes for component in once_components(bundle, request))


def once_components(bundle: Bundle, request: Request) -> list[str]:
    """The components that run once before the prefill of a request."""
    router = [] if bundle.instance_router is None else [bundle.instance_router.component]
    encoders = [encoder.component for encoder in bundle.encoders] if request.images else []
    return [*router, *encoders]


def _adapter_bytes(bundle: Bundle, request: Request) -> int:
    """The chosen adapters as float32: one set, or one for each row of the prefill and again for each beam."""
    if bundle.adapters is None:
        return 0
    header = TensorFile(bundle.path(bundle.adapters.file)).header
    banks = [info.shape for name, info in header.items() if name.startswith(BANKS)]
    one = _FLOAT32 * sum(math.prod(shape) for shape in banks) // bundle.adapters.num_experts
    if request.batch == 1:
        return one
    return one * request.batch * (1 + (request.num_beams if request.num_beams > 1 else 0))


def _vision_activations(bundle: Bundle, header: Mapping[str, TensorInfo]) -> int:
    """The largest of the encoders, which run one after another, on one picture at a time."""
    return max(
        _FLOAT32
        * (
            2 * each.tiles * each.heads * each.tokens**2
            + each.tiles * each.tokens * (6 * each.hidden + 2 * each.widest)
        )
        for each in encoder_shapes(bundle, header)
    )


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a vision encoder: tiles of a picture that run together, patches of each, and of its layers."""

    tiles: int
    tokens: int
    hidden: int
    heads: int
    widest: int


def encoder_shapes(bundle: Bundle, header: Mapping[str, TensorInfo]) -> list[EncoderShape]:
    """Of every encoder of a bundle; with S2 all tiles of its largest scale run together."""
    return [_encoder_shape(bundle, encoder, header) for encoder in bundle.encoders]


def _encoder_shape(bundle: Bundle, encoder: Encoder, header: Mapping[str, TensorInfo]) -> EncoderShape:
    names = bundle.residency[encoder.component].weights
    convolutions = [view.shape for view in weight_views(header, names) if len(view.shape) == 4]
    hidden, patch = (convolutions[0][0], convolutions[0][-1]) if convolutions else (bundle.model.hidden_size, 14)
    tiles = 1
    if isinstance(encoder.processor, PatchSettings):
        tokens = encoder.processor.max_patches
    else:
        tokens = (encoder.processor.image_size // patch) ** 2
        if len(bundle.encoders) == 1:  # alone it is not pooled: more patches than rows are tiles
            tiles, tokens = max(1, tokens // encoder.tokens), encoder.tokens
    return EncoderShape(tiles, tokens, hidden, max(1, hidden // 64), widest_output(header, names, 0))


def widest_output(header: Mapping[str, TensorInfo], names: Iterable[str], skipped: int) -> int:
    """The largest output of a weight matrix among these, without those of size `skipped`, the vocabulary's."""
    shapes = [view.shape for view in weight_views(header, names)]
    return max((shape[0] for shape in shapes if len(shape) == 2 and shape[0] != skipped), default=1)
