"""Targets: what `moiie build` compiles a bundle for. A recipe adds its own (recipe_targets.py)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moiie_runtime.errors import MoiieError

Backend = Literal["onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx"]
Dialect = Literal["cpu", "cuda", "trt10", "trt11", "rtx"]
Precision = Literal["float32", "float16", "bfloat16"]
Residency = Literal["resident", "after_prefill"]
Plugins = Literal["required", "optional", "off"]
Banks = Literal["inputs", "constants"]
KvDtype = Literal["float32", "float16"]

GB = 10**9
"""What vendors call a gigabyte; an 8 GB module shows about that many bytes to programs."""


@dataclass(frozen=True)
class Target:
    """One thing a bundle can be built for.

    Attributes:
        name: folder of the result: BUNDLE/engines/<name>.
        about: one line for people.
        backend: which builder makes it and which session runs it.
        dialect: the pass list that the graphs go through.
        sms: compute capabilities of the GPU times ten (87 is Orin), ascending; empty for a CPU.
        memory: bytes of the device that a run may take; None: whatever the machine has.
        precision: of activations and of weights that are not quantised.
        prefill: rows of each prefill profile, ascending; a prompt runs in the smallest that holds it. Longer prompts go
            through in several steps.
        batch: rows of prefill and decode; decode has static shapes.
        images: most pictures that the vision encoder takes at once.
        residency: `after_prefill` releases the vision encoder and its experts before the answer.
        plugins: `required`: nodes of the plugin library stay; `optional`: as required when a build is given a library, else
            as off; `off`: standard layers alone, where each token goes through every expert.
        banks: expert weights bound when the engine runs (`inputs`), or stored in the engine (`constants`).
        embed_plugins: the plugin library is stored in the engine; else it lies beside it.
        threads: of a CPU; None: as many as there are cores.
        kv_cache: storage of keys and values on a CPU; TensorRT stores them in `precision`.
        prefill_chunk: tokens of a prompt that a CPU takes at once; None: all.
    """

    name: str
    about: str
    backend: Backend
    dialect: Dialect
    sms: tuple[int, ...] = ()
    memory: int | None = None
    precision: Precision = "float16"
    prefill: tuple[int, ...] = (1024,)
    batch: int = 1
    images: int = 1
    residency: Residency = "resident"
    plugins: Plugins = "required"
    banks: Banks = "inputs"
    embed_plugins: bool = True
    threads: int | None = None
    kv_cache: KvDtype = "float32"
    prefill_chunk: int | None = None

    @property
    def expected(self) -> bool:
        """Whether what is said of its library was never tried here: TensorRT itself, unlike TensorRT for RTX."""
        return self.backend == "tensorrt"


def _jetson(name: str, about: str, sm: int, memory: int) -> Target:
    return Target(name, about, "tensorrt", "trt10", (sm,), memory * GB, residency="after_prefill", prefill=(128, 1024))


BUILT_IN: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "ONNX Runtime on this machine's CPU", "onnxruntime", "cpu", precision="float32", plugins="off"),
        Target("ort-cuda", "ONNX Runtime on an NVIDIA GPU", "onnxruntime_cuda", "cuda", plugins="off"),
        Target(
            "rtx",
            "TensorRT for RTX on GeForce and RTX cards",
            "tensorrt_rtx",
            "rtx",
            (86, 89, 120),
            prefill=(128, 1024),
            plugins="optional",
        ),
        _jetson("orin-nano", "Jetson Orin Nano 8 GB, JetPack 6", 87, 8),
        _jetson("orin-nx", "Jetson Orin NX 16 GB, JetPack 6", 87, 16),
        _jetson("orin-32", "Jetson AGX Orin 32 GB, JetPack 6", 87, 32),
        _jetson("orin", "Jetson AGX Orin 64 GB, JetPack 6", 87, 64),
        _jetson("thor", "Jetson AGX Thor 128 GB, JetPack 7", 110, 128),
        Target(
            "server",
            "TensorRT 11 on data-centre and workstation cards",
            "tensorrt",
            "trt11",
            (80, 86, 89, 90, 100, 120),
            prefill=(128, 1024, 4096),
        ),
    )
}
"""The targets that need no recipe, by name."""

DIALECT_SMS: Mapping[Dialect, frozenset[int]] = {
    "rtx": frozenset({80, 86, 89, 120, 121}),
    "trt10": frozenset({75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}),
    "trt11": frozenset({75, 80, 86, 89, 90, 100, 103, 120, 121}),
}
"""GPUs that each dialect's library builds for: rtx found by building with 1.7.1, which has no float32 products for SM 75, as
the router has them; the others expected from NVIDIA's documents. JetPack (87, 110) has TensorRT 10 only."""

OLDEST_SMS: Mapping[str, int] = {"int4": 80, "fp8": 89, "w8a8": 75}
"""Format of weights -> oldest GPU whose arithmetic has it in TensorRT; below SM 89 it builds nothing that holds E4M3."""

NATIVE_MOE_SMS = frozenset({100, 103})
"""GPUs for which TensorRT 11 has a layer for experts, by NVIDIA's documents."""

BACKENDS: tuple[str, ...] = get_args(Backend)


def has_native_moe(target: Target) -> bool:
    """Whether experts of a target become TensorRT's own layer, which wants them as constants."""
    wanted = target.plugins != "required" and target.banks == "constants"
    return target.dialect == "trt11" and wanted and bool(target.sms) and set(target.sms) <= NATIVE_MOE_SMS


def find_target(name: str, own: Mapping[str, Target] | None = None) -> Target:
    """The target of this name.

    Args:
        name: one of the recipe's or a built-in one.
        own: targets of a recipe; they go first.

    Raises:
        MoiieError: there is none; the message lists those there are.
    """
    known = {**BUILT_IN, **(own or {})}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, list(known), n=1)
    raise MoiieError(
        f"there is no target {name!r} (there are: {', '.join(known)})",
        f"did you mean {close[0]}?" if close else "a recipe adds targets in its section `targets`",
    )
