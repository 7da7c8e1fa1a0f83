"""What cannot be timed without a GPU but can be read from the compiled code: spilled registers, instructions of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.cpp.shell import SM, tools
from tests.plugins.interpreter import needs_triton

pytestmark = needs_triton

_COMPILE = """
import sys
from pathlib import Path
from moiie_plugins.images import PTX_VERSION, Job, compile_job, prepare_worker
from moiie_plugins.launch import plans
out = Path(sys.argv[1])
prepare_worker(str(out / "scratch"))
kernels = {launch.kernel.name: launch.kernel for plan in plans() for launch in plan.launches}
for name in sys.argv[2:]:
    for sm in (87, 90):
        (image,) = compile_job(Job(kernels[name], sm, PTX_VERSION[sm], ("cubin",)))
        (out / f"{name}.{sm}.cubin").write_bytes(image.code)
"""
FUNCTIONS = ("expert_prefill_gate_up", "expert_prefill_down")


def test_no_kernel_for_usual_sizes_spills_registers(tmp_path: Path) -> None:
    """Those for any sizes, `.any`, may: they read two bytes at a time, which takes more addresses than there is room for."""
    from tests.plugins.machine_code import read_machine_code

    folder = tools().folder
    table = json.loads((folder / "launch_table.json").read_text(encoding="utf-8"))
    code = (folder / "kernels.bin").read_bytes()
    spilling, registers = set(), set()
    for name, kernel in table["kernels"].items():
        image = next(image for image in kernel["images"] if (image["sm"], image["kind"]) == (SM, "cubin"))
        cubin = tmp_path / name
        cubin.write_bytes(code[image["offset"] : image["offset"] + image["size"]])
        found = read_machine_code(cubin)
        registers.add(found.registers)
        if found.stack:
            spilling.add(name)
    assert {name for name in spilling if not name.endswith(".any")} == set()
    assert min(registers) > 8


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kernels for experts in four bits, for Orin and Hopper."""
    folder = tmp_path_factory.mktemp("int4")
    command = [sys.executable, "-c", _COMPILE, str(folder), *(f"{function}.float16.int4" for function in FUNCTIONS)]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)
    return folder


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("sm", [87, 90])
def test_unpacking_leaves_the_tensor_cores_most_of_the_time(int4: Path, function: str, sm: int) -> None:
    """Each number is unpacked once a block and by about two instructions.

    On Orin a thread has 64 products of 16 x 8 x 16 in a step, 8 cycles each, and 240 instructions or so of one cycle. When
    every warp unpacks all weights for itself, which Triton does for products of two matrices of weights with one of tokens,
    there are 2000. On Hopper two programs share an SM, so that one unpacks while the other multiplies: 128 registers.
    """
    from tests.plugins.machine_code import read_machine_code

    code = read_machine_code(int4 / f"{function}.float16.int4.{sm}.cubin")
    assert code.stack == 0
    assert code.step["HMMA" if sm == 87 else "HGMMA"] == (64 if sm == 87 else 4)
    assert code.instructions <= (280 if sm == 87 else 220)
    assert sm == 87 or code.registers <= 128
