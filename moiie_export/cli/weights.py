"""Weights of a bundle by dtype and by component, from the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
    return {**_count(stored.values()), "by_dtype": by_dtype, "by_component": by_component}


def _count(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    sizes = [size for _, size in tensors]
    return {"tensors": len(sizes), "bytes": sum(sizes)}
