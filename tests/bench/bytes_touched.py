"""How many bytes of a bundle one decode step has to read: what bounds its speed at a given memory bandwidth."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_runtime.tensors import TensorFile

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_COMPANIONS = ("", ".scales", ".input_scale")
_FLOAT32 = 4


@dataclass(frozen=True)
class Touched:
    """Bytes of one decode step.

    Attributes:
        common: weights that every token uses.
        experts: weights of the `top_k` experts that a token is sent to, over all layers.
        kv_per_position: keys and values of one position, over all layers.
        resident: weights that some token may use in decode.
    """

    common: int
    experts: float
    kv_per_position: int
    resident: int

    def at(self, context: float) -> float:
        """Bytes of a step with `context` positions in the cache."""
        return self.common + self.experts + self.kv_per_position * context


def bundle_bytes(bundle: Path, target: str = "") -> Touched:
    """Of a bundle directory, as its weight file stores it, with the cache of the form built for `target`, if any.

    What a built form stores more does not move the bound.
    """
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    engine = bundle / "engines" / target / "engine.json"
    if target and engine.is_file():
        manifest["kv_cache"] |= json.loads(engine.read_text(encoding="utf-8"))["kv_cache"]
    header = TensorFile(bundle / manifest["embed_tokens"]["file"]).header
    return decode_bytes(manifest, {name: (info.shape, info.nbytes) for name, info in header.items()})


def decode_bytes(manifest: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> Touched:
    """From a manifest and the shape and bytes of each tensor of its weight file.

    A layer's experts may differ in size: then a token is taken to be sent to each of them equally often.
    """
    model = manifest["model"]
    layers: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    common = 0
    for name in sorted(set(map(_owner, manifest["residency"]["decode"]["weights"]))):
        size = sum(_bytes(name + end, tensors) for end in _COMPANIONS)
        if match := _EXPERT.fullmatch(name):
            layers[match[1]][int(match[2])] += size
        else:
            common += size
    top_k = model["moe"]["top_k"] if model["moe"] else 0
    means = [sum(experts.values()) / len(experts) for experts in layers.values()]
    resident = common + sum(sum(experts.values()) for experts in layers.values())
    kv = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"]
    width = 2 if manifest["kv_cache"]["dtype"] == "float16" else _FLOAT32
    return Touched(common, top_k * sum(means), width * kv, resident)


def _owner(name: str) -> str:
    """The weight that a name belongs to: scales are counted with it."""
    for end in _COMPANIONS[1:]:
        name = name.removesuffix(end)
    return name


def _bytes(name: str, tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> int:
    """A tensor's bytes, or those of one expert's rows of a stack; 0 when there is no such tensor."""
    if name in tensors:
        return tensors[name][1]
    match = _EXPERT.fullmatch(name)
    stack = tensors.get(f"{match[1]}.{match[3]}") if match else None
    return stack[1] // stack[0][0] if stack else 0
