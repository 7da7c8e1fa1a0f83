"""Which engines a target gets from a bundle, and the shapes each is built for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moiie_export.targets import Target
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.residency import weight_views
from moiie_runtime.tensors import TensorFile, TensorInfo
from moiie_runtime.vision_settings import PatchSettings

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUANTISED = frozenset({"I8", "U8", "F8_E4M3", "I4"})

Range = tuple[int, int, int]
"""Smallest, best and largest size of a dimension."""


@dataclass(frozen=True)
class Profile:
    """Named sizes for a graph's open dimensions."""

    name: str
    sizes: Mapping[str, Range]


@dataclass(frozen=True)
class EngineSpec:
    """One engine.

    Attributes:
        component: graph of the bundle.
        profiles: what it is built for; one without sizes when all its shapes are fixed.
        constants: bytes of weights stored in the engine.
        banks: bytes of experts that are bound when it runs.
    """

    component: str
    profiles: tuple[Profile, ...]
    constants: int
    banks: int

    @property
    def file(self) -> str:
        """Name of the engine below engines/<target>."""
        return f"{self.component}.engine"


def engine_specs(bundle: Bundle, target: Target) -> list[EngineSpec]:
    """The engines of a target, in the order in which they run.

    Raises:
        MoiieError: the target's precision is not one TensorRT attention has, or its profiles do not fit the bundle.
    """
    if target.precision == "float32":
        raise MoiieError(
            f"target {target.name}: precision float32: TensorRT's attention layers compute in half precision",
            "set precision: float16 or bfloat16 for the target",
        )
    header = TensorFile(bundle.path(bundle.embed_tokens.file)).header
    return [
        EngineSpec(name, tuple(_profiles(bundle, target, name)), *_weights(bundle, target, header, phase))
        for name, phase in bundle.phases.items()
    ]


def decode_experts(bundle: Bundle) -> dict[int, tuple[int, ...]]:
    """Layer -> experts that a decode step, whose tokens are language, can reach."""
    moe = bundle.model.moe
    return {} if moe is None else {layer: tuple(moe.expert_groups["language"]) for layer in moe.layers}


def _profiles(bundle: Bundle, target: Target, component: str) -> Iterator[Profile]:
    if component == "decoder_decode":
        yield Profile("decode", {})
    elif component == "decoder_prefill":
        smallest = 1
        capacity = bundle.kv_cache.capacity
        for rows in target.prefill:
            largest = min(rows, capacity)
            if largest >= smallest:
                yield Profile(f"prefill_{largest}", {"sequence": (smallest, largest, largest)})
            smallest = largest + 1
    elif bundle.instance_router is not None and component == bundle.instance_router.component:
        longest = bundle.instance_router.max_length
        yield Profile("instruction", {"words": (1, min(64, longest), longest)})
    else:
        encoder = next(each for each in bundle.encoders if each.component == component)
        sizes: dict[str, Range] = {"images": (1, 1, target.images)}
        if isinstance(encoder.processor, PatchSettings):
            patches = encoder.processor.max_patches
            sizes["patches"] = (1, patches, patches)
        yield Profile("images", sizes)


def _weights(bundle: Bundle, target: Target, header: Mapping[str, TensorInfo], phase: str) -> tuple[int, int]:
    """Bytes of constants and of banks in the target's precision; what is quantised stays as it is stored."""
    constants, banks = 0, 0
    for name in bundle.residency[phase].weights:
        size = sum(_stored_bytes(header, name, shape, target) for shape in _shapes(header, name))
        if target.banks == "inputs" and ".experts." in name:
            banks += size
        else:
            constants += size
    return constants, banks


def _shapes(header: Mapping[str, TensorInfo], name: str) -> list[tuple[int, ...]]:
    return [view.shape for view in weight_views(header, [name])]


def _stored_bytes(header: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], target: Target) -> int:
    info = header.get(name) or header.get(_stack(name))
    quantised = info is not None and info.dtype in _QUANTISED
    return math.prod(shape) * (1 if quantised else ITEM_BYTES[target.precision])


def _stack(name: str) -> str:
    head, _, tail = name.partition(".experts.")
    return f"{head}.experts.{tail.partition('.')[2]}"
