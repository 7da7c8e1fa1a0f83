"""One kernel compiled for one SM: the cubin or PTX and what a launcher must know, read from Triton's own output."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import io
import os
import re
from dataclasses import dataclass, field
from typing import Any

from moiie_plugins.launch import ALIGNMENT, Kernel
from moiie_plugins.tiles import SHARED_KIB
from moiie_runtime.errors import MoiieError

PTX_VERSION = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 110: 90, 120: 87}
"""PTX ISA by SM: the oldest that knows the SM and all that most kernels use, so that old drivers take it."""
FP8_PTX_VERSION = 81
"""The oldest PTX ISA that converts E4M3 numbers on every SM that has them; 8.0 does not on SM 89."""

_TRITON_TYPES = {
    "float8_e4m3fn": "fp8e4nv",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
}
_PTX_TYPES = {"int32": "u32", "int64": "u64", "float32": "f32"}


@dataclass(frozen=True)
class Job:
    """A kernel to compile for an SM; `kinds` are the images to keep: cubin, ptx."""

    kernel: Kernel
    sm: int
    ptx_version: int
    kinds: tuple[str, ...]

    @property
    def isa(self) -> str:
        """The PTX version in words."""
        return f"PTX ISA {self.ptx_version // 10}.{self.ptx_version % 10}"

    def __hash__(self) -> int:
        return hash((self.kernel.name, self.sm, self.ptx_version, self.kinds))


@dataclass(frozen=True)
class Image:
    """What a driver loads. `extra_pointers`: pointer parameters that Triton appended and the kernel does not use."""

    sm: int
    kind: str
    entry: str
    extra_pointers: int
    num_warps: int
    shared: int
    ptx_version: int
    code: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        """Of the code."""
        return hashlib.sha256(self.code).hexdigest()

    def record(self) -> dict[str, Any]:
        """As JSON, code and all."""
        return {**self.__dict__, "code": base64.b64encode(self.code).decode()}

    @classmethod
    def load(cls, record: dict[str, Any]) -> Image:
        """The image that `record` was made from."""
        return cls(**{**record, "code": base64.b64decode(record["code"])})

    def placed(self, offset: int, blocks: dict[str, int], constants: dict[str, int | None]) -> dict[str, Any]:
        """As it stands in the launch table."""
        return {
            "sm": self.sm,
            "kind": self.kind,
            "offset": offset,
            "size": len(self.code),
            "sha256": self.sha256,
            "num_warps": self.num_warps,
            "shared": self.shared,
            "ptx_version": self.ptx_version,
            "blocks": blocks,
            "constants": constants,
        }


def prepare_worker(scratch: str) -> None:
    """Before Triton is imported: compile instead of interpret, and leave nothing behind."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = scratch
    # Line numbers carry this machine's paths into the images.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def ptx_parameters(ptx: str) -> list[str]:
    """The types of a kernel's parameters, in order.

    Raises:
        MoiieError: the text does not hold exactly one kernel.
    """
    entries = re.findall(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    if len(entries) != 1:
        raise MoiieError(f"expected one kernel in the PTX, found {len(entries)}")
    return re.findall(r"\.param\s+\.(\w+)", entries[0])


def _extra_pointers(kernel: Kernel, parameters: list[str], metadata: Any) -> int:
    """How many pointers Triton appended to our arguments.

    Raises:
        MoiieError: the rest are not our arguments, or a kernel needs what a launcher would have to allocate.
    """
    ours = ["u64" if argument.pointer else _PTX_TYPES[argument.type] for argument in kernel.arguments]
    extra = parameters[len(ours) :]
    if parameters[: len(ours)] != ours or any(kind != "u64" for kind in extra):
        raise MoiieError(f"kernel {kernel.name}: its parameters are {parameters}, expected {ours} and scratch pointers")
    for need in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, need, 0):
            raise MoiieError(
                f"kernel {kernel.name} needs {need} = {getattr(metadata, need)}, which no launcher gives it"
            )
    return len(extra)


def _check_fit(job: Job, metadata: Any) -> None:
    limit = SHARED_KIB[job.sm] * 1024
    if metadata.shared > limit:
        raise MoiieError(
            f"kernel {job.kernel.name} needs {metadata.shared} bytes of shared memory; SM {job.sm} has {limit}",
            "give it a smaller tile or fewer stages in plugins/tiles.py",
        )
    if metadata.num_ctas != 1:
        raise MoiieError(f"kernel {job.kernel.name} was compiled for clusters of {metadata.num_ctas} blocks")


def _reason(error: Exception) -> str:
    """The lines of a compiler's message that say what is wrong, each once; some print the whole program after them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [re.sub(r"^ptxas \S+, line \d+; error\s*: ", "", line) for line in lines if "error" in line.lower()]
    return "; ".join(list(dict.fromkeys(telling or lines))[:3])


def compile_job(job: Job) -> list[Image]:
    """Runs in a worker process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = job.kernel
    function = getattr(importlib.import_module(f"moiie_plugins.kernels.{kernel.module}"), kernel.function)
    constants = kernel.constants(job.sm)
    signature, attributes = {}, {}
    arguments = {argument.name: argument for argument in kernel.arguments}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        argument = arguments[name]
        signature[name] = ("*" if argument.pointer else "") + _TRITON_TYPES[argument.type]
        if argument.pointer or name in kernel.multiples:
            attributes[(place,)] = [["tt.divisibility", ALIGNMENT]]
    fixed = {(function.arg_names.index(name),): value for name, value in constants.items()}
    tile = kernel.tile(job.sm)
    options = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
        "ptx_version": job.ptx_version,
    }
    source = ASTSource(function, signature, fixed, attributes)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints a program that does not compile
            compiled = triton.compile(source, target=GPUTarget("cuda", job.sm, 32), options=options)
    except Exception as error:  # of Triton, of LLVM or of ptxas, each with classes of its own
        raise MoiieError(
            f"kernel {kernel.name} does not compile for SM {job.sm}, {job.isa}: {_reason(error)}"
        ) from None
    _check_fit(job, compiled.metadata)
    ptx = compiled.asm["ptx"]
    extra = _extra_pointers(kernel, ptx_parameters(ptx), compiled.metadata)
    codes = {"cubin": compiled.asm["cubin"], "ptx": ptx.encode() + b"\0"}
    about = (compiled.metadata.name, extra, compiled.metadata.num_warps, compiled.metadata.shared, job.ptx_version)
    return [Image(job.sm, kind, *about, codes[kind]) for kind in job.kinds]
