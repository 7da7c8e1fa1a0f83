"""A Jetson is read from its files; what is missing or damaged is left out, and no other machine is taken for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from moiie_runtime.device_memory import free_memory
from moiie_runtime.jetson import Clock, SharedMemory, read_jetson, shared_memory
from tests.host_device import TOTAL, HostDevice
from tests.jetsons import AGX_ORIN, ORIN_NANO, PC, RASPBERRY, THOR, system


def silent(_: Sequence[str]) -> str:
    return ""


def test_an_orin_nano(tmp_path: Path) -> None:
    jetson = read_jetson(system(tmp_path, ORIN_NANO), silent)
    assert jetson is not None
    assert jetson.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (jetson.sm, jetson.l4t, jetson.jetpack, jetson.tensorrt) == (87, (36, 4, 3), "6.2", (10, 3))
    assert (jetson.power_mode, jetson.best_mode) == ("25W", (2, "MAXN_SUPER"))
    assert jetson.clocks == (
        Clock("GPU", 306_000_000, 306_000_000, 918_000_000),
        Clock("CPU", 729_600_000, 729_600_000, 1_344_000_000),
    )
    assert not any(clock.locked for clock in jetson.clocks)
    kib = 1024
    assert jetson.memory == SharedMemory(7802912 * kib, 3120000 * kib, 3901440 * kib, zram=3901440 * kib)


def test_an_agx_orin(tmp_path: Path) -> None:
    jetson = read_jetson(system(tmp_path, AGX_ORIN), silent)
    assert jetson is not None
    assert (jetson.sm, jetson.jetpack, jetson.power_mode, jetson.best_mode) == (87, "6.2.1", "MAXN", (0, "MAXN"))
    assert all(clock.locked for clock in jetson.clocks)
    assert jetson.memory is not None
    assert jetson.memory.zram == 0 < jetson.memory.swap


def test_a_thor_is_asked_for_its_power_mode(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(command: Sequence[str]) -> str:
        asked.append(tuple(command))
        return "NV Power Mode: 120W\n1\n"

    jetson = read_jetson(system(tmp_path, THOR), ask)
    assert jetson is not None
    assert (jetson.sm, jetson.jetpack, jetson.tensorrt) == (110, "7.0", (10, 13))
    assert (jetson.power_mode, jetson.best_mode) == ("120W", None)
    assert asked == [("nvpmodel", "-q")]
    assert [clock.name for clock in jetson.clocks] == ["GPU"]


@pytest.mark.parametrize(
    ("revision", "jetpack", "tensorrt"),
    [
        ("# R39 (release), REVISION: 2.0, x", "7.2", (10, 16)),
        ("# R38 (release), REVISION: 4.0, x", "7.1", (10, 13)),
        ("# R36 (release), REVISION: 4.7, x", "6.2.1", (10, 3)),
        ("# R36 (release), REVISION: 4.0, x", "6.1", (10, 3)),
        ("# R36 (release), REVISION: 3.0, x", "6.0", (8, 6)),
        ("# R35 (release), REVISION: 4.1, x", "5", (8, 5)),
        ("# R32 (release), REVISION: 7.1, x", None, None),
    ],
)
def test_releases(tmp_path: Path, revision: str, jetpack: str | None, tensorrt: tuple[int, int] | None) -> None:
    jetson = read_jetson(system(tmp_path, {"etc/nv_tegra_release": revision}), silent)
    assert jetson is not None
    assert (jetson.jetpack, jetson.tensorrt) == (jetpack, tensorrt)


@pytest.mark.parametrize("files", [PC, RASPBERRY, {}])
def test_other_machines_are_none(tmp_path: Path, files: Mapping[str, str]) -> None:
    assert read_jetson(system(tmp_path, files), silent) is None


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\xfe\x00garbage\n", b"9" * 400, b": kB\npmode:\n< POWER_MODEL ID= NAME= >"]
)
def test_damaged_files_cost_their_own_fact_alone(tmp_path: Path, damage: bytes) -> None:
    whole = read_jetson(system(tmp_path / "whole", ORIN_NANO), silent)
    for index, name in enumerate(ORIN_NANO):
        jetson = read_jetson(system(tmp_path / str(index), {**ORIN_NANO, name: damage}), silent)
        assert jetson is not None, name
        assert whole is not None
        changed = {key for key, value in vars(jetson).items() if value != vars(whole)[key]}
        part = {"nv_tegra": "l4t", "compatible": "sm", "model": "model", "nvpmodel/": "power_mode", "freq": "clocks"}
        part |= {"nvpmodel.conf": "power_mode", "mem": "memory", "swaps": "memory"}
        allowed = {value for key, value in part.items() if key in name} | ({"best_mode"} if "conf" in name else set())
        assert changed <= allowed, name


def test_a_folder_in_a_files_place_is_no_crash(tmp_path: Path) -> None:
    root = system(tmp_path, {"etc/nv_tegra_release": ORIN_NANO["etc/nv_tegra_release"]})
    for name in ("proc/meminfo", "var/lib/nvpmodel/status", "proc/device-tree/model"):
        (root / name).mkdir(parents=True)
    jetson = read_jetson(root, silent)
    assert jetson is not None
    assert (jetson.model, jetson.sm, jetson.memory, jetson.power_mode) == ("Jetson", None, None, None)


def test_a_missing_command_is_an_empty_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    jetson = read_jetson(system(tmp_path, THOR))
    assert jetson is not None
    assert jetson.power_mode is None


def test_on_a_jetson_memory_that_the_system_would_give_back_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not count pages that hold files."""
    for files, free in ((ORIN_NANO, 3120000 * 1024), (PC, TOTAL)):
        root = system(tmp_path / str(free), files)
        monkeypatch.setattr("moiie_runtime.device_memory.shared_memory", lambda root=root: shared_memory(root))
        assert free_memory(HostDevice()) == free
