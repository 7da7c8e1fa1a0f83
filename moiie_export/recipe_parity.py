"""The recipe's sections `calibration` and `parity`: prompts and pictures to measure on, and what may differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moiie_export.recipe_schema import Limits, key

_FRACTION = Limits(minimum=0, maximum=1)
_BOUND = Limits(minimum=0)


@dataclass(frozen=True)
class ParityCase:
    """One prompt, for what is compared or measured."""

    prompt: str = key("The question, as for `moiie run -p`.")
    images: tuple[Path, ...] = key("Pictures, relative to the recipe file.", ())


@dataclass(frozen=True)
class Bounds:
    """How far the bundle may be from its own weights in PyTorch. An error is max|difference| / max(1, max|reference|)."""

    vision_error: float = key("Image features.", 2e-4, limits=_BOUND)
    hidden_error: float = key("Hidden states after each layer.", 2e-4, limits=_BOUND)
    kv_error: float = key("Keys and values of each layer.", 2e-4, limits=_BOUND)
    logits_error: float = key("Logits.", 2e-4, limits=_BOUND)
    routing_agreement: float = key("Share of tokens, ties apart, that go to the same experts.", 1.0, limits=_FRACTION)
    tie_margin: float = key(
        "A token whose experts differ is a tie below this gap of router probability.", 1e-5, limits=_BOUND
    )
    tie_fraction: float = key("Largest share of ties.", 0.01, limits=_FRACTION)


@dataclass(frozen=True)
class QuantizedBounds:
    """How far the quantised model may be from the float32 one, both in PyTorch and each running on its own."""

    logits_error: float = key("Logits.", 0.03, limits=_BOUND)
    routing_agreement: float = key(
        "Share of tokens, over all layers, that go to the same experts.", 0.98, limits=_FRACTION
    )
    top1_agreement: float = key("Share of positions with the same most probable token.", 0.97, limits=_FRACTION)
    weight_error: float = key("Each weight: root mean square of the difference / of the weight.", 0.02, limits=_BOUND)


@dataclass(frozen=True)
class Int4Bounds(QuantizedBounds):
    """The same with what int4 costs."""

    logits_error: float = key("Logits.", 0.4, limits=_BOUND)
    routing_agreement: float = key("As for int8.", 0.95, limits=_FRACTION)
    top1_agreement: float = key("As for int8.", 0.85, limits=_FRACTION)
    weight_error: float = key("As for int8.", 0.2, limits=_BOUND)


@dataclass(frozen=True)
class Fp8Bounds(QuantizedBounds):
    """The same with what fp8 costs."""

    logits_error: float = key("Logits.", 0.2, limits=_BOUND)
    routing_agreement: float = key("As for int8.", 0.97, limits=_FRACTION)
    top1_agreement: float = key("As for int8.", 0.9, limits=_FRACTION)
    weight_error: float = key("As for int8.", 0.05, limits=_BOUND)


@dataclass(frozen=True)
class EngineBounds(Bounds):
    """Bounds of engines that round activations: a router's near ties fall either way more often."""

    vision_error: float = key("Image features.", 0.05, limits=_BOUND)
    hidden_error: float = key("Hidden states after each layer.", 0.2, limits=_BOUND)
    kv_error: float = key("Keys and values of each layer.", 0.1, limits=_BOUND)
    logits_error: float = key("Logits.", 0.2, limits=_BOUND)
    routing_agreement: float = key("Share of tokens, ties apart, that go to the same experts.", 0.9, limits=_FRACTION)
    tie_margin: float = key("As for float32.", 0.05, limits=_BOUND)
    tie_fraction: float = key("Largest share of ties.", 0.2, limits=_FRACTION)


@dataclass(frozen=True)
class HalfBounds(Bounds):
    """Bounds of engines that compute in float16 or bfloat16: about a thousand times as coarse as float32."""

    vision_error: float = key("Image features.", 0.03, limits=_BOUND)
    hidden_error: float = key("Hidden states after each layer.", 0.05, limits=_BOUND)
    kv_error: float = key("Keys and values of each layer.", 0.05, limits=_BOUND)
    logits_error: float = key("Logits.", 0.05, limits=_BOUND)
    routing_agreement: float = key("Share of tokens, ties apart, that go to the same experts.", 0.99, limits=_FRACTION)
    tie_margin: float = key("As for float32.", 0.01, limits=_BOUND)
    tie_fraction: float = key("Largest share of ties.", 0.1, limits=_FRACTION)


@dataclass(frozen=True)
class BoundsByDtype:
    """Bounds for each storage type."""

    float32: Bounds = key("For bundles with dtype float32.", factory=Bounds)
    float16: Bounds = key("For bundles with dtype float16 (both sides compute in float32).", factory=Bounds)
    int8: QuantizedBounds = key("Beside these, where weights are int8 or w8a8.", factory=QuantizedBounds)
    int4: Int4Bounds = key("Beside these, where weights are int4.", factory=Int4Bounds)
    fp8: Fp8Bounds = key("Beside these, where weights are fp8.", factory=Fp8Bounds)
    engine_int8: EngineBounds = key(
        "Instead, for built engines that round activations to int8 in blocks of 32.", factory=EngineBounds
    )
    engine_half: HalfBounds = key("Instead, for built engines that compute in half precision.", factory=HalfBounds)


@dataclass(frozen=True)
class ParitySection:
    """What `moiie parity` compares and what it tolerates."""

    cases: tuple[ParityCase, ...] = key("Prompts to compare; none: a made-up picture and text.", ())
    bounds: BoundsByDtype = key("Tolerances, per storage type.", factory=BoundsByDtype)


@dataclass(frozen=True)
class CalibrationSection:
    """Pictures and prompts of the kind that the model will see, for what export measures."""

    images: tuple[Path, ...] = key(
        "Pictures, relative to the recipe file. With several vision experts, the size of their features is measured, "
        "which the runtime's skip_below needs.",
        (),
    )
    cases: tuple[ParityCase, ...] = key(
        "Prompts with their pictures, which awq, gptq, w8a8 and export.islands measure on; with pictures, or the "
        "experts that only pictures reach get nothing.",
        (),
    )
