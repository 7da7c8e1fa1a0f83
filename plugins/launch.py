"""Which kernels an op launches: plans with grids, arguments and workspaces, as data (README.md explains the words).

Nothing here needs Triton. The C++ shell reads the plans from the launch table, `run.py` follows the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moiie_plugins.tiles import Tile, kernel_tile

MAX_DECODE_ROUTES = 16
BLOCK_M = 128
"""Rows of a block of routed rows at prefill. One for all GPUs, so that no workspace depends on the SM."""
SPLIT = 256
"""Slots of the cache that one program of decode_attention_split visits."""
ALIGNMENT = 16
"""H, I and D that are multiples of it let rows be read 16 bytes at a time."""
_LENGTHS = ("H", "I", "D")
BITS = {"float16": 16, "bfloat16": 16, "fp8": 8, "int8": 8, "int4": 4}
OLDEST_SM = {"fp8": 89}
"""Weights -> the first GPUs that convert them: neither Triton nor TensorRT has E4M3 for older ones."""

GridAxis = tuple[str, "int | str"]


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel: its name, what is bound to it, and its type; pointers say what they point to."""

    name: str
    binding: str
    type: str
    pointer: bool


@dataclass(frozen=True)
class Kernel:
    """A kernel function for certain types.

    Attributes:
        name: unique: the function and the types it is compiled for.
        module, function: where the function is, in moiie_plugins.kernels.
        arguments: those that are passed at a launch, in order.
        fixed: parameters that are compiled in, beside the tile's.
        multiples: integer parameters that are multiples of ALIGNMENT wherever this kernel is used.
        oldest_sm: the first GPUs that it is compiled for; 0: all.
    """

    name: str
    module: str
    function: str
    arguments: tuple[Argument, ...]
    fixed: Mapping[str, int | None]
    multiples: tuple[str, ...] = ()
    oldest_sm: int = 0

    def tile(self, sm: int) -> Tile:
        """Block sizes, warps and stages on that SM."""
        return kernel_tile(self.function, self.fixed.get("BITS") or 0, sm)

    def constants(self, sm: int) -> dict[str, int | None]:
        """Everything that is compiled in."""
        return {**self.fixed, **self.tile(sm).blocks}


@dataclass(frozen=True)
class Symbol:
    """floor(sum(term * factor) / divisor); an empty term is 1."""

    name: str
    terms: tuple[str, ...]
    factors: tuple[int, ...]
    divisor: int


@dataclass(frozen=True)
class Workspace:
    """A buffer: the product of `dims` times `bytes`, and the type of its elements."""

    name: str
    dims: tuple[str, ...]
    bytes: int
    type: str


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid; an axis is cdiv(symbol, block)."""

    kernel: Kernel
    grid: tuple[GridAxis, GridAxis, GridAxis]


@dataclass(frozen=True)
class Plan:
    """The launches of an op for certain types and sizes."""

    op: str
    dtype: str
    weights: str
    launches: tuple[Launch, ...]
    aligned: bool | None = None
    routes: tuple[int, int] = (0, -1)
    symbols: tuple[Symbol, ...] = ()
    workspace: tuple[Workspace, ...] = field(default=())

    def fits(self, symbols: Mapping[str, int]) -> bool:
        """Whether sizes lie in the plan's range."""
        low, high = self.routes
        routes = symbols.get("routes", 0)
        whole = all(symbols.get(name, 0) % ALIGNMENT == 0 for name in _LENGTHS)
        return (not self.aligned or whole) and low <= routes and (high == -1 or routes <= high)

    @property
    def oldest_sm(self) -> int:
        """The first GPUs that have all its kernels; 0: all."""
        return max(launch.kernel.oldest_sm for launch in self.launches)

    def derive(self, symbols: Mapping[str, int]) -> dict[str, int]:
        """The op's symbols and the plan's own."""
        known = {**symbols, "": 1}
        for symbol in self.symbols:
            total = sum(known[term] * factor for term, factor in zip(symbol.terms, symbol.factors, strict=True))
            known[symbol.name] = total // symbol.divisor
        return known


_FUNCTIONS: dict[str, tuple[str, str]] = {
    "expert_route": (
        "routing",
        """
        expert_ids:int32* order=workspace.order:int32* block_rows=workspace.block_rows:int32*
        expert_mask=experts:int64 routes:int32 blocks:int32
        """,
    ),
    "expert_decode_gate_up": (
        "expert_decode",
        """
        hidden:x* expert_ids:int32* gate_up:word* gate_up_scales:scale* act=workspace.act:float32*
        expert_mask=experts:int64 top_k:int32 hidden_size=H:int32 intermediate=I:int32 group_shift:int32
        """,
    ),
    "expert_decode_down": (
        "expert_decode",
        """
        act=workspace.act:float32* expert_ids:int32* expert_weights:float32* down:word* down_scales:scale* out:x*
        expert_mask=experts:int64 top_k:int32 hidden_size=H:int32 intermediate=I:int32 group_shift:int32
        """,
    ),
    "expert_prefill_gate_up": (
        "expert_prefill",
        """
        hidden:x* order=workspace.order:int32* block_rows=workspace.block_rows:int32* gate_up:word*
        gate_up_scales:scale* act=workspace.act:x*
        top_k:int32 hidden_size=H:int32 intermediate=I:int32 group_shift:int32
        """,
    ),
    "expert_prefill_down": (
        "expert_prefill",
        """
        act=workspace.act:x* order=workspace.order:int32* block_rows=workspace.block_rows:int32*
        expert_weights:float32* down:word* down_scales:scale* partial=workspace.partial:x*
        hidden_size=H:int32 intermediate=I:int32 group_shift:int32
        """,
    ),
    "expert_combine": (
        "expert_prefill",
        """
        partial=workspace.partial:x* expert_ids:int32* out:x*
        expert_mask=experts:int64 top_k:int32 hidden_size=H:int32
        """,
    ),
    "kv_cache_update": (
        "attention",
        "cache:x* update:x* past_lengths:int32* G:int32 S:int32 T:int32 D:int32",
    ),
    "decode_attention_split": (
        "attention",
        """
        query:x* key:x* value:x* past_lengths:int32* partial=workspace.partial:float32* stats=workspace.stats:float32*
        G:int32 T:int32 S:int32 D:int32 shared:int32 splits:int32 window:int32 scale:float32
        """,
    ),
    "decode_attention_merge": (
        "attention",
        "partial=workspace.partial:float32* stats=workspace.stats:float32* out:x* D:int32 splits:int32",
    ),
    "deformable_sample": (
        "deformable",
        "value:x* points:float32* weights:float32* grid_size:float32* out:x* S:int32 h:int32 D:int32 Q:int32 P:int32",
    ),
}
"""Function -> its module and its parameters: name, what is bound to it where that is called otherwise, type. x is the
type of input 0; weights are 32-bit words where they are whole numbers."""

_INTEGERS = {"word": "int32", "scale": "float16"}
_STORED: Mapping[str, Mapping[str, str]] = {
    "fp8": {"word": "float8_e4m3fn", "scale": "float32"},
    "int8": _INTEGERS,
    "int4": _INTEGERS,
}
"""Quantised weights -> the types of the parameters that hold them."""
_EXPERT_OPS = {"fp8": "Fp8ExpertDispatch", "int8": "QuantizedExpertDispatch", "int4": "QuantizedExpertDispatch"}


def _arguments(function: str, dtype: str, weights: str, fixed: Mapping[str, int | None]) -> tuple[Argument, ...]:
    types = {"x": dtype, **_STORED.get(weights, {"word": weights})}
    arguments = []
    for word in _FUNCTIONS[function][1].split():
        names, kind = word.split(":")
        name, _, binding = names.partition("=")
        if name not in fixed:
            element = kind.removesuffix("*")
            arguments.append(Argument(name, binding or name, types.get(element, element), kind.endswith("*")))
    return tuple(arguments)


def _kernel(function: str, dtype: str, weights: str = "", *, aligned: bool = True) -> Kernel:
    fixed: dict[str, int | None] = {}
    if weights:
        fixed["BITS"] = BITS[weights]
        if weights not in ("int8", "int4"):
            fixed["group_shift"] = 0
        if weights not in _STORED:
            fixed["gate_up_scales" if function.endswith("gate_up") else "down_scales"] = None
    arguments = _arguments(function, dtype, weights, fixed)
    lengths = tuple(argument.name for argument in arguments if argument.binding in _LENGTHS)
    multiples = lengths if aligned else ()
    name = ".".join(part for part in (function, dtype, weights) if part) + (".any" if lengths and not aligned else "")
    return Kernel(name, _FUNCTIONS[function][0], function, arguments, fixed, multiples, OLDEST_SM.get(weights, 0))


def _axes(*axes: GridAxis) -> tuple[GridAxis, GridAxis, GridAxis]:
    padded = [*axes, ("", 1), ("", 1)][:3]
    return (padded[0], padded[1], padded[2])


def _expert_plans(dtype: str, weights: str, aligned: bool | None) -> list[Plan]:
    op = _EXPERT_OPS.get(weights, "ExpertDispatch")

    # Rows in groups are whole groups of 32 columns or more.
    whole = aligned is not False

    def launch(function: str, *axes: GridAxis) -> Launch:
        return Launch(_kernel(function, dtype, weights, aligned=whole), _axes(*axes))

    decode = Plan(
        op,
        dtype,
        weights,
        (
            launch("expert_decode_gate_up", ("routes", 1), ("I", "BLOCK_N")),
            launch("expert_decode_down", ("T", 1), ("H", "BLOCK_N")),
        ),
        aligned,
        (1, MAX_DECODE_ROUTES),
        workspace=(Workspace("act", ("routes", "I"), 4, "float32"),),
    )
    prefill = Plan(
        op,
        dtype,
        weights,
        (
            Launch(_kernel("expert_route", ""), _axes(("n", 1))),
            launch("expert_prefill_gate_up", ("blocks", 1), ("I", "BLOCK_N")),
            launch("expert_prefill_down", ("blocks", 1), ("H", "BLOCK_N")),
            Launch(_kernel("expert_combine", dtype, aligned=whole), _axes(("T", 1), ("H", "BLOCK_N"))),
        ),
        aligned,
        (MAX_DECODE_ROUTES + 1, -1),
        symbols=(
            Symbol("blocks", ("routes", "n"), (1, BLOCK_M - 1), BLOCK_M),
            Symbol("padded_routes", ("blocks",), (BLOCK_M,), 1),
        ),
        workspace=(
            Workspace("order", ("padded_routes",), 4, "int32"),
            Workspace("block_rows", ("blocks",), 4, "int32"),
            Workspace("act", ("padded_routes", "I"), 2, dtype),
            Workspace("partial", ("routes", "H"), 2, dtype),
        ),
    )
    return [decode, prefill]


def _attention_plans(dtype: str, *, aligned: bool) -> list[Plan]:
    def launch(function: str, *axes: GridAxis) -> Launch:
        return Launch(_kernel(function, dtype, aligned=aligned), _axes(*axes))

    attention = Plan(
        "DecodeAttention",
        dtype,
        "",
        (
            launch("decode_attention_split", ("heads", 1), ("splits", 1), ("shared", "BLOCK_M")),
            launch("decode_attention_merge", ("out_rows", 1)),
        ),
        aligned,
        symbols=(Symbol("splits", ("S", ""), (1, SPLIT - 1), SPLIT),),
        workspace=(
            Workspace("partial", ("out_rows", "splits", "D"), 4, "float32"),
            Workspace("stats", ("out_rows", "splits"), 8, "float32"),
        ),
    )
    return [Plan("KVCacheUpdate", dtype, "", (launch("kv_cache_update", ("rows", 1)),), aligned), attention]


def _deformable_plan(dtype: str, *, aligned: bool) -> Plan:
    kernel = _kernel("deformable_sample", dtype, aligned=aligned)
    return Plan("DeformableSample", dtype, "", (Launch(kernel, _axes(("Q", "BLOCK_Q"), ("h", 1), ("n", 1))),), aligned)


def plans() -> list[Plan]:
    """Every plan there is. Of plans for the same types the first that fits is taken: aligned ones stand first."""
    found: list[Plan] = []
    for dtype in ("float16", "bfloat16"):
        for weights in (dtype, "fp8"):
            found += _expert_plans(dtype, weights, True) + _expert_plans(dtype, weights, False)
        for weights in ("int8", "int4"):
            found += _expert_plans(dtype, weights, None)
    for aligned in (True, False):
        found += _attention_plans("float16", aligned=aligned)
        found += [_deformable_plan(dtype, aligned=aligned) for dtype in ("float32", "float16")]
    return found


def choose(candidates: Sequence[Plan], kind: tuple[str, str, str], symbols: Mapping[str, int]) -> Plan:
    """The first plan for (op, dtype, weights) that fits.

    Raises:
        LookupError: there is none.
    """
    for plan in candidates:
        if (plan.op, plan.dtype, plan.weights) == kind and plan.fits(symbols):
            return plan
    raise LookupError(f"no kernels for {kind[0]} in {kind[1]}{' with weights in ' + kind[2] if kind[2] else ''}")


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as it stands in the launch table."""
    return {
        "op": plan.op,
        "dtype": plan.dtype,
        "weights": plan.weights,
        "aligned": plan.aligned,
        "min_routes": plan.routes[0],
        "max_routes": plan.routes[1],
        "symbols": [
            {"name": s.name, "terms": list(s.terms), "factors": list(s.factors), "divisor": s.divisor}
            for s in plan.symbols
        ],
        "workspace": [{"name": w.name, "dims": list(w.dims), "bytes": w.bytes} for w in plan.workspace],
        "launches": [
            {"kernel": launch.kernel.name, "grid": [list(axis) for axis in launch.grid]} for launch in plan.launches
        ],
    }
