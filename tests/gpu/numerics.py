"""The kernels against the ops' references in float64, at sizes that fill whole tiles and at sizes that do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from moiie_export.ops.cached_attention import cached_attention
from moiie_export.ops.deformable_sample import deformable_sample
from moiie_plugins.launch import OLDEST_SM
from moiie_plugins.run import run
from tests.plugins.experts import TOLERANCE, Layer, make_case, relative_error

F16, BF16 = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Outcome:
    """An error relative to the largest value, and what it may be."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Place:
    """Where kernels run, whose tiles they use, and whether sizes are real ones."""

    device: torch.device
    sm: int
    toy: bool

    def bound(self, dtype: torch.dtype) -> float:
        """Of a relative error. A GPU rounds bfloat16, which the interpreter cuts off."""
        return TOLERANCE[dtype] if self.toy or dtype == F16 else 1.2e-2


def _layers(toy: bool) -> Iterator[tuple[str, Layer, int, int]]:
    hidden, intermediate = (128, 128) if toy else (3072, 8192)
    for dtype, name in ((F16, "float16"), (BF16, "bfloat16")):
        for bits, group in ((16, 32), (8, 32), (8, 128), (8, 0), (4, 32), (4, 64), (4, 128)):
            stored = name if bits == 16 else f"int{bits} by {group}" if group else "fp8"
            for tokens in (1,) if toy else (1, 8, 800):
                yield f"{name} x {stored}", Layer(hidden, intermediate, (0, 1, 2, 3), dtype, bits, group), tokens, 2
    odd = (37, 19) if toy else (1001, 517)
    for tokens in (2, 17):
        yield "odd sizes", Layer(*odd, tuple(range(5)), F16), tokens, 3
        yield "odd sizes, fp8", Layer(*odd, tuple(range(5)), F16, 8, 0), tokens, 3
    yield "64 experts", Layer(64, 32, tuple(range(64)), F16), 6 if toy else 333, 3


def expert_outcomes(place: Place) -> Iterator[Outcome]:
    """Every type of weights, decode and prefill."""
    for name, layer, tokens, top_k in _layers(place.toy):
        if (layer.bits, layer.group) == (8, 0) and place.sm < OLDEST_SM["fp8"]:
            continue
        random = torch.Generator(place.device).manual_seed(tokens)
        scores = torch.rand(tokens, len(layer.experts), generator=random, device=place.device)
        case = make_case(layer, scores.topk(top_k).indices)
        hidden = case.tensors["hidden"]
        out = torch.full_like(hidden, float("nan"))
        kernels = run(case.op, case.tensors, out, case.attributes, place.sm)
        kind = "decode" if len(kernels) == 2 else "prefill"
        error = relative_error(out, case.expected())
        yield Outcome(f"{kind} {tokens} tokens, {name}", error, place.bound(layer.dtype))


def ragged_outcomes(place: Place) -> Iterator[Outcome]:
    """All rows on one expert; experts without rows; routes to experts that the bank has not."""
    tokens, sizes = (20, (32, 16)) if place.toy else (700, (512, 384))
    one = torch.full((tokens, 1), 2, device=place.device)
    away = torch.stack([torch.arange(tokens), torch.arange(tokens) + 1], dim=1).to(place.device) % 7
    for name, ids, experts in (("all on one expert", one, (0, 1, 2, 3)), ("experts of other banks", away, (1, 5))):
        case = make_case(Layer(*sizes, experts), ids)
        out = torch.full_like(case.tensors["hidden"], float("nan"))
        run(case.op, case.tensors, out, case.attributes, place.sm)
        yield Outcome(name, relative_error(out, case.expected()), place.bound(F16))


def attention_outcomes(place: Place) -> Iterator[Outcome]:
    """A cache that is updated in place, and attention to it."""
    cases = [(4, 2, 1, 96, [70, 3], 0), (4, 4, 2, 64, [270, 9], 8), (2, 1, 1, 72, [9], 0)]
    if not place.toy:
        cases = [(32, 32, 1, 96, [3000, 17], 0), (32, 8, 1, 128, [4000, 2047], 2048), (32, 8, 4, 128, [1000, 0], 0)]
        cases.append((16, 16, 1, 72, [1000, 3], 0))
    for heads, key_heads, tokens, size, past, window in cases:
        random = torch.Generator(place.device).manual_seed(heads + size)
        batch, capacity = len(past), max(past) + tokens + 7

        def normal(*shape: int, random: torch.Generator = random) -> torch.Tensor:
            return torch.randn(shape, generator=random, device=place.device).half()

        query = normal(batch, heads, tokens, size)
        new, caches = normal(2, batch, key_heads, tokens, size), normal(2, batch, key_heads, capacity, size)
        lengths = torch.tensor(past, dtype=torch.int32)
        positions = lengths.long().unsqueeze(1) + torch.arange(tokens)
        arguments = [tensor.double().cpu() for tensor in (query, *new, *caches)]
        expected, *presents = cached_attention(*arguments, positions, key_heads, window)
        lengths = lengths.to(place.device)
        wrong = 0.0
        for cache, update, present in zip(caches, new, presents, strict=True):
            run("KVCacheUpdate", {"cache": cache, "update": update, "past_lengths": lengths}, None, {}, place.sm)
            wrong += float((cache.double().cpu() != present).sum())
        shape = f"{heads}/{key_heads} heads of {size}, {tokens} tokens, {max(past)} keys, window {window}"
        yield Outcome(f"cache update, {shape}", wrong, 0.0)
        out = torch.full_like(query, float("nan"))
        tensors = {"query": query, "key": caches[0], "value": caches[1], "past_lengths": lengths}
        run("DecodeAttention", tensors, out, {"window": window}, place.sm)
        yield Outcome(f"attention, {shape}", relative_error(out.cpu(), expected), 2e-3)


def sampling_outcomes(place: Place) -> Iterator[Outcome]:
    """Samples in and around maps."""
    queries, heads, widths = (19, 2, (24, 32)) if place.toy else (256, 8, (128, 88))
    for (dtype, bound), width in product(((torch.float32, 1e-5), (torch.float16, 1e-3)), widths):
        random = torch.Generator(place.device).manual_seed(width)
        value = torch.randn(2, 600, heads, width, generator=random, device=place.device).to(dtype)
        points = torch.rand(2, queries, heads, 4, 2, generator=random, device=place.device) * 30 - 3
        weights = torch.rand(2, queries, heads, 4, generator=random, device=place.device)
        grid_size = torch.tensor([[24.0, 24.0], [20.0, 30.0]], device=place.device)
        tensors = {"value": value, "points": points, "weights": weights, "grid_size": grid_size}
        out = torch.full((2, queries, heads * width), float("nan"), dtype=dtype, device=place.device)
        run("DeformableSample", tensors, out, {}, place.sm)
        expected = deformable_sample(*(tensor.double() for tensor in tensors.values()))
        yield Outcome(f"deformable sampling, heads of {width}, {str(dtype)[6:]}", relative_error(out, expected), bound)


def outcomes(place: Place) -> Iterator[Outcome]:
    """Everything."""
    yield from expert_outcomes(place)
    yield from ragged_outcomes(place)
    yield from attention_outcomes(place)
    yield from sampling_outcomes(place)
