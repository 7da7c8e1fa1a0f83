"""`moiie doctor` on a Jetson: what it is, and what slows it down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from moiie_export.cli import jetson as module
from moiie_export.cli.environment import Finding
from moiie_export.cli.jetson import jetson_findings
from moiie_runtime.jetson import read_jetson
from tests.cli.conftest import Moiie
from tests.jetsons import AGX_ORIN, ORIN_NANO, PC, THOR, system


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distributions and their versions, as this Python would see them on the Jetson."""
    found = {"tensorrt": "10.3.0"}
    monkeypatch.setattr(module, "_names", lambda: found)
    return found


def findings(folder: Path, files: Mapping[str, str]) -> dict[str, Finding]:
    jetson = read_jetson(system(folder, files), lambda _: "")
    assert jetson is not None
    return {each.name: each for each in jetson_findings(jetson)}


def test_a_slow_board_is_told_what_to_do(tmp_path: Path, packages: dict[str, str]) -> None:
    found = findings(tmp_path, ORIN_NANO)
    warned = {name for name, each in found.items() if each.status == "warn"}
    assert warned == {"power mode", "GPU clock", "CPU clock", "shared memory", "swap"}
    assert all(found[name].hint for name in warned)
    assert found["power mode"].hint == "sudo nvpmodel -m 2"
    assert found["GPU clock"].detail.startswith("moves between 306 and 918 MHz")
    assert found["shared memory"].detail == "3.0 GiB of 7.4 GiB free, shared by CPU and GPU"
    assert found["jetson"].detail.endswith("SM 87, Jetson Linux 36.4.3 (JetPack 6.2)")
    assert found["jetson tensorrt"] == Finding("jetson tensorrt", "ok", "10.3.0, JetPack's own")


def test_a_board_that_is_set_up_is_not_warned(tmp_path: Path, packages: dict[str, str]) -> None:
    assert {each.status for each in findings(tmp_path, AGX_ORIN).values()} <= {"ok", "info"}


def test_tensorrt_is_the_systems(tmp_path: Path, packages: dict[str, str]) -> None:
    packages.clear()
    assert "--system-site-packages" in str(findings(tmp_path / "a", ORIN_NANO)["jetson tensorrt"].hint)
    packages |= {"tensorrt": "10.13.3", "tensorrt-cu12": "10.13.3", "tensorrt-cu12-libs": "10.13.3"}
    pip = findings(tmp_path / "b", ORIN_NANO)["jetson tensorrt"]
    assert pip.status == "warn"
    assert pip.hint == "pip uninstall -y tensorrt tensorrt-cu12 tensorrt-cu12-libs"
    old = {**ORIN_NANO, "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1,"}
    packages.clear()
    assert "engines need 10.3" in findings(tmp_path / "c", old)["jetson tensorrt"].detail


def test_thor_without_a_readable_power_mode(tmp_path: Path, packages: dict[str, str]) -> None:
    found = findings(tmp_path, THOR)
    assert found["power mode"].status == "info"
    assert found["swap"].status == "info"
    assert "10.3.0; JetPack 7.0 comes with 10.13" in found["jetson tensorrt"].detail


def test_doctor_says_it(
    moiie: Moiie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]
) -> None:
    assert "jetson" not in moiie("doctor").out
    monkeypatch.setattr(module, "read_jetson", lambda: read_jetson(system(tmp_path, ORIN_NANO), lambda _: ""))
    result = moiie("doctor")
    assert result.code == 0
    assert "warn  power mode" in result.out
    assert "MAXN_SUPER does not" in result.out
    assert "power mode: sudo nvpmodel -m 2" in result.err
    listed = {each["name"] for each in moiie("doctor", "--json").document["findings"]}
    assert {"jetson", "GPU clock", "swap"} <= listed


def test_elsewhere_it_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_jetson", lambda: read_jetson(system(tmp_path, PC), lambda _: ""))
    assert list(jetson_findings()) == []
