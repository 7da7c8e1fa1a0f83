"""What a GPU executes, read from a cubin by the disassembler that comes with Triton: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"^\s*\.?(L_x_\d+):")
_JUMP = re.compile(r"\bBRA\b.*`\(\.(L_x_\d+)\)")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")


@dataclass(frozen=True)
class MachineCode:
    """A file that holds one kernel.

    Attributes:
        cubin: the file.
        registers: of a thread.
        stack: bytes of a thread in memory, which registers that were too few are spilled to.
    """

    cubin: Path
    registers: int
    stack: int

    @cached_property
    def step(self) -> Counter[str]:
        """Instructions of a thread in the loop that multiplies most, by their names; empty where there is none."""
        return _step(_output("nvdisasm", "-c", self.cubin).splitlines())

    @property
    def instructions(self) -> int:
        """Of a step."""
        return self.step.total()


def read_machine_code(cubin: Path) -> MachineCode:
    """What a kernel takes; its instructions are read when they are asked for."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _output("cuobjdump", "-res-usage", cubin))
    assert usage is not None, cubin
    return MachineCode(cubin, int(usage[1]), int(usage[2]))


def _step(lines: list[str]) -> Counter[str]:
    labels = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    jumps = [(labels.get(match[1], len(lines)), end) for end, line in enumerate(lines) if (match := _JUMP.search(line))]
    loops = [_opcodes(lines[start : end + 1]) for start, end in jumps if start < end]
    most = max(map(_products, loops), default=0)
    # Of loops within each other the innermost: what stands around it multiplies, too, but little.
    return min((each for each in loops if _products(each) > most / 2), key=Counter.total, default=Counter())


def _opcodes(lines: list[str]) -> Counter[str]:
    return Counter(match[1] for line in lines if (match := _OPCODE.search(line)))


def _products(opcodes: Counter[str]) -> int:
    matrices = sum(count for name, count in opcodes.items() if name.endswith("MMA"))
    return matrices or sum(count for name, count in opcodes.items() if name.startswith("FFMA"))


def _output(tool: str, option: str, cubin: Path) -> str:
    return subprocess.run([_TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
