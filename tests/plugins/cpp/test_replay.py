"""What the library launches, replayed in Triton's interpreter: a wrong kernel, grid or argument gives a wrong result."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_plugins.run import plan_for
from tests.plugins.cpp.arena import Arena, Library, replay
from tests.plugins.cpp.nodes import EXAMPLES, Example
from tests.plugins.cpp.shell import SM, Said, drive, tools

WORKSPACE = 4 << 20


def _library() -> Library:
    folder = tools().folder
    table = json.loads((folder / "launch_table.json").read_text(encoding="utf-8"))
    return Library(table, (folder / "kernels.bin").read_bytes())


def _filled(example: Example, path: Path, in_place: bool) -> tuple[Arena, dict[str, int]]:
    """An arena with the inputs in it; an output that is no input, or is not updated in place, has a place of its own."""
    arena = Arena(path)
    offsets = {name: arena.place(name, value.shape, value.dtype) for name, value in example.inputs.items()}
    if example.output not in offsets or not in_place:
        offsets["output"] = arena.place("output", example.shape, example.dtype)
    arena.place("workspace", (WORKSPACE,), torch.uint8)
    arena.open()
    for name, value in example.inputs.items():
        arena[name].copy_(value)
    return arena, offsets


def _run(example: Example, arena: Arena, offsets: dict[str, int], log: Path, **environment: str) -> Said:
    node = example.node(offsets)
    workspace = arena.places["workspace"][0]
    said = drive(
        [f"arena {arena.path} {arena.size}", *node.lines(), f"build {node.op}", f"run {workspace}"],
        {"STUB_LOG": str(log), "STUB_SM": str(SM), **environment},
    )
    assert not said.all("failed"), said.lines
    assert not said.all("log"), said.lines
    return said


def _check(example: Example, arena: Arena) -> None:
    result = arena["output" if "output" in arena.places else example.output].double()
    assert torch.isfinite(result).all()
    error = (result - example.expected).abs().max() / example.expected.abs().max()
    assert error <= example.tolerance
    for name, value in example.inputs.items():
        if name != example.output:
            assert torch.equal(arena[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_recorded_launches_compute_the_op(name: str, tmp_path: Path) -> None:
    example, log = EXAMPLES[name](), tmp_path / "log"
    arena, offsets = _filled(example, tmp_path / "arena", in_place=True)
    said = _run(example, arena, offsets, log)
    assert int(said.one("workspace")) <= WORKSPACE
    launched = replay(_library(), log, arena, int(said.one("arena")))
    assert tuple(each.split(".")[0] for each in launched) == example.kernels
    lists = example.attributes.items()
    attributes = {name: value[0] if name != "experts" and isinstance(value, list) else value for name, value in lists}
    plan, _, _ = plan_for(example.op, example.inputs, attributes)
    assert launched == [launch.kernel.name for launch in plan.launches], "those for rows of these lengths"
    _check(example, arena)
    workspace = arena["workspace"][int(said.one("workspace")) :]
    assert bool((workspace == 255).all()), "written behind the workspace that was asked for"
    assert not arena.damage()


def test_a_cache_that_is_not_updated_in_place_is_copied_first(tmp_path: Path) -> None:
    example, log = EXAMPLES["cache"](), tmp_path / "log"
    arena, offsets = _filled(example, tmp_path / "arena", in_place=False)
    said = _run(example, arena, offsets, log)
    assert said.one("interface") == "2 alias 0"  # what asks TensorRT for one buffer
    assert replay(_library(), log, arena, int(said.one("arena")))[0] == "copy"
    _check(example, arena)
    assert torch.equal(arena["cache"], example.inputs["cache"])


def test_a_driver_that_refuses_cubins_gets_ptx(tmp_path: Path) -> None:
    """JetPack's driver may be older than Triton's compiler."""
    example, log = EXAMPLES["decode"](), tmp_path / "log"
    arena, offsets = _filled(example, tmp_path / "arena", in_place=True)
    said = _run(example, arena, offsets, log, STUB_NO_CUBINS="1")
    library = _library()
    calls = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {library.find(call)[2]["kind"] for call in calls} == {"ptx"}
    replay(library, log, arena, int(said.one("arena")))
    _check(example, arena)


def test_a_node_without_rows_launches_nothing(tmp_path: Path) -> None:
    example = EXAMPLES["decode"]()
    rows = {name: example.inputs[name][:0] for name in ("hidden", "expert_ids", "expert_weights")}
    none = replace(example, inputs={**example.inputs, **rows}, shape=(0, 64))
    arena, offsets = _filled(none, tmp_path / "arena", in_place=True)
    _run(none, arena, offsets, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def _smaller_grid(calls: list[dict[str, Any]]) -> None:
    calls[0]["grid"][1] -= 1


def _swapped_pointers(calls: list[dict[str, Any]]) -> None:
    arguments = calls[1]["arguments"]
    arguments[0], arguments[3] = arguments[3], arguments[0]


def _other_number(calls: list[dict[str, Any]]) -> None:
    place = calls[1]["arguments"].index(struct.pack("<i", 48).hex())
    calls[1]["arguments"][place] = struct.pack("<i", 32).hex()


def _missing_launch(calls: list[dict[str, Any]]) -> None:
    del calls[0]


@pytest.mark.parametrize("spoil", [_smaller_grid, _swapped_pointers, _other_number, _missing_launch])
def test_a_wrong_launch_is_seen(spoil: Callable[[list[dict[str, Any]]], None], tmp_path: Path) -> None:
    from triton.runtime.errors import InterpreterError

    example, log = EXAMPLES["decode"](), tmp_path / "log"
    arena, offsets = _filled(example, tmp_path / "arena", in_place=True)
    said = _run(example, arena, offsets, log)
    calls = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    spoil(calls)
    log.write_text("".join(json.dumps(call) + "\n" for call in calls), encoding="utf-8")

    def judge() -> None:
        replay(_library(), log, arena, int(said.one("arena")))
        _check(example, arena)

    with pytest.raises((AssertionError, InterpreterError)):  # the second: what it computes is no number
        judge()
