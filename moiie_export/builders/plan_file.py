"""What the bytes of an engine of TensorRT for RTX say without a GPU: its version, its targets, and parts of its graph.

The format is not documented: offsets and names were read off engines of version 1.7.1.116 and hold for it alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moiie_runtime.errors import Unsound

HEADER_SIZE, MAGIC = 64, b"vtrt"
_SM_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
_HINT = "build it again with `moiie build --force`"


@dataclass(frozen=True)
class PlanHeader:
    """The first bytes of an engine.

    Attributes:
        version: of the library that built it, as four numbers.
        sms: compute capabilities it was built for.
        length: bytes of the file, as it says.
    """

    version: tuple[int, int, int, int]
    sms: tuple[int, ...]
    length: int


def read_header(path: Path) -> PlanHeader:
    """The header of an engine file.

    Raises:
        Unsound: the file is no engine, is cut off, or has been changed at its start.
    """
    with path.open("rb") as file:
        head = file.read(HEADER_SIZE)
    if len(head) < HEADER_SIZE or not head.startswith(MAGIC):
        raise Unsound(f"{path}: is no TensorRT engine: it begins with {head[:4]!r}, expected {MAGIC!r}", _HINT)
    length = int.from_bytes(head[0x10:0x18], "little")
    size = path.stat().st_size
    if length != size:
        raise Unsound(f"{path}: is damaged: its header speaks of {length} bytes, the file has {size}", _HINT)
    mask = int.from_bytes(head[0x20:0x24], "little")
    numbers = tuple(head[0x18:0x1C])
    return PlanHeader((numbers[0], numbers[1], numbers[2], numbers[3]), _sms(mask), length)


def plan_text(data: bytes) -> str:
    """The readable lines of an engine: its compiled graph is stored as text."""
    found = re.findall(rb"[\x09\x20-\x7e\n]{8,}", data)
    return "\n".join(part.decode("ascii") for part in found)


def accelerators(text: str) -> set[tuple[int, ...]]:
    """The lists of compute capabilities that the parts of the compiled graph are for; parts for any are left out."""
    lists = re.findall(r"accelerators=\{([^}*]*)\}", text)
    return {tuple(sorted(int(sm) for sm in re.findall(r"sm(\d+)", each))) for each in lists}


def profile_bounds(text: str) -> list[tuple[int, int]]:
    """The bounds that the engine checks its dynamic dimensions against, in the order of its text."""
    return [(int(low), int(high)) for low, high in re.findall(r"is out of bounds \[(\d+), (\d+)\]", text)]


def work_memory(text: str) -> int:
    """Bytes of the device that the parts of the compiled graph work in, where profiles leave their sizes fixed."""
    sizes = re.findall(r"region = \{ name=devmem\S* size=(\d+) ", text)
    return sum(int(size) for size in sizes)


def causal_masks(text: str) -> int:
    """How many kernels compute a causal mask aligned to the newest key: key <= query + (keys - queries)."""
    return len(set(re.findall(r"function=\{ name=__myl_\w*Iota\w*SubAddLte\w* fqn=(\w+)", text)))


def _sms(mask: int) -> tuple[int, ...]:
    return tuple(sm for sm, bit in _SM_BITS.items() if mask & bit)
