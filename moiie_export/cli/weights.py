"""Weights of a bundle by dtype and by component, from the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

_FLOATS = {"F32": "float32", "F16": "float16"}

if TYPE_CHECKING:
    from moiie_runtime.bundle import Bundle


def weight_summary(bundle: Bundle) -> dict[str, Any]:
    """Counts and bytes of the stored tensors, by dtype, and those that each graph and the host's embedding table use.

    A graph that uses some experts of a stacked tensor counts these experts only.

    Raises:
        MoiieError: a weight file is missing or damaged.
    """
    from moiie_runtime.tensors import read_header

    stored: dict[str, tuple[str, int]] = {}
    for name in bundle.files:
        if name.endswith(".safetensors"):
            header = read_header(bundle.path(name))
            stored |= {info.name: (info.dtype, info.nbytes) for info in header.values()}
    by_component = {
        name: {"tensors": len(resident.weights), "bytes": resident.bytes}
        for name in bundle.components
        if (resident := bundle.residency.get(name.removeprefix("decoder_"))) is not None
    }
    embed = bundle.embed_tokens.tensor
    by_component["embed_tokens"] = _count([stored[embed]] if embed in stored else [])
    by_dtype = {
        dtype: _count(each for each in stored.values() if each[0] == dtype)
        for dtype in sorted({dtype for dtype, _ in stored.values()})
    }
    summary = {**_count(stored.values()), "by_dtype": by_dtype, "by_component": by_component}
    return summary | {"by_bank": _by_bank(bundle)}


def _by_bank(bundle: Bundle) -> dict[str, dict[str, dict[str, int]]]:
    """Bank -> format -> parameters and their bytes, scales included. Adapters, which no graph holds, are left out."""
    from moiie_export.quantize.banks import BANKS, bank_of
    from moiie_runtime.residency import stored_tensor
    from moiie_runtime.tensors import read_header

    header = read_header(bundle.path(bundle.embed_tokens.file))
    groups = None if bundle.model.moe is None else bundle.model.moe.expert_groups
    names = {name for each in bundle.residency.values() for name in each.weights} | {bundle.embed_tokens.tensor}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name in sorted(names):
        owner = name.removesuffix(".input_scale").removesuffix(".scales")
        place, place_of_owner = stored_tensor(header, name), stored_tensor(header, owner)
        if place is None or place_of_owner is None:
            continue
        (info, share), (own, _) = place, place_of_owner
        form = bundle.quantization.get(own.name, _FLOATS.get(own.dtype, own.dtype))
        entry = found.setdefault(bank_of(owner, groups), {}).setdefault(form, {"parameters": 0, "bytes": 0})
        entry["parameters"] += name == owner
        entry["bytes"] += info.nbytes // share
    return {bank: found[bank] for bank in BANKS if bank in found}


def _count(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    sizes = [size for _, size in tensors]
    return {"tensors": len(sizes), "bytes": sum(sizes)}
