"""What the plugins' kernels ask of a GPU, read from the compiled code: no GPU is needed, and nothing is timed.

A kernel that is bound by arithmetic can be no faster than its instructions are issued: an SM issues four a cycle, each for
32 threads. `issue` is how many a thread issues for each 16 x 8 x 16 product of matrices (prefill) or for each weight
(decode) in the loop over columns; a tensor core takes 4 (SM 90), 8 (SM 80, 87) or 16 cycles (SM 86, 89, 120) for the product.

    python tests/bench/kernel_code.py --sms 87,90 [--keep FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TRITON_INTERPRET"] = "0"

from moiie_plugins.images import FP8_PTX_VERSION, PTX_VERSION, Job, compile_job, prepare_worker  # noqa: E402
from moiie_plugins.launch import Kernel, plans  # noqa: E402
from tests.bench.record import append, environment, show  # noqa: E402
from tests.plugins.machine_code import read_machine_code  # noqa: E402


def expert_kernels() -> list[Kernel]:
    """Those that multiply, for usual sizes."""
    kernels = {launch.kernel.name: launch.kernel for plan in plans() for launch in plan.launches}
    return [kernel for name, kernel in kernels.items() if "BITS" in kernel.fixed and not name.endswith(".any")]


def measure(kernel: Kernel, sm: int, folder: Path) -> dict[str, Any]:
    """One line of the table."""
    (image,) = compile_job(Job(kernel, sm, max(PTX_VERSION[sm], FP8_PTX_VERSION), ("cubin",)))
    cubin = folder / f"{kernel.name}.{sm}"
    cubin.write_bytes(image.code)
    code = read_machine_code(cubin)
    tile = kernel.tile(sm)
    both = 2 if kernel.function.endswith("gate_up") else 1
    weights = both * tile.blocks["BLOCK_N"] * tile.blocks["BLOCK_K"]
    work = weights * tile.blocks["BLOCK_M"] / (16 * 8 * 16) if "BLOCK_M" in tile.blocks else weights / 32
    return {
        "kernel": kernel.name,
        "sm": sm,
        "registers": code.registers,
        "spilled": code.stack,
        "shared": image.shared,
        "threads": 32 * tile.num_warps,
        "step": code.instructions,
        "issue": code.instructions * tile.num_warps / work,
    }


def rows(sms: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Every kernel on every SM that has it."""
    for kernel in expert_kernels():
        for sm in sms:
            if sm >= kernel.oldest_sm:
                yield measure(kernel, sm, folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", default="87,90,120", help="compute capabilities as 10 * major + minor")
    parser.add_argument("--keep", type=Path, help="append a JSON line to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepare_worker(name)
        found = list(rows([int(sm) for sm in given.sms.split(",")], Path(name)))
    heads = list(found[0])
    show("Kernels' code", heads, [[row[head] for head in heads] for row in found])
    append(given.keep, {"benchmark": "kernel_code", **environment(("moiie-export", "triton")), "rows": found})


if __name__ == "__main__":
    main()
