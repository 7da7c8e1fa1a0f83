"""What an NVIDIA Jetson says about itself in the files of its system: module, release, power mode, clocks, memory.

Every file may be missing, as in a container, or hold something else: a fact that cannot be read is None or left out.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SMS = {"tegra234": 87, "tegra264": 110}
"""System on chip, as the device tree names it -> compute capability times ten: Orin, Thor."""

_RELEASES: tuple[tuple[tuple[int, ...], str, tuple[int, int]], ...] = (
    ((39, 2), "7.2", (10, 16)),
    ((38, 4), "7.1", (10, 13)),
    ((38, 2), "7.0", (10, 13)),
    ((36, 5), "6.2.2", (10, 3)),
    ((36, 4, 4), "6.2.1", (10, 3)),
    ((36, 4, 3), "6.2", (10, 3)),
    ((36, 4), "6.1", (10, 3)),
    ((36, 3), "6.0", (8, 6)),
    ((34,), "5", (8, 5)),
)
"""First release of Jetson Linux -> JetPack and the TensorRT that comes with it, newest first; from NVIDIA's release notes."""

Ask = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Clock:
    """A clock in Hz: `lowest` and `highest` are the bounds that it may move between now."""

    name: str
    now: int
    lowest: int
    highest: int

    @property
    def locked(self) -> bool:
        """Whether it stays at its highest, as `jetson_clocks` makes it."""
        return self.lowest == self.highest


@dataclass(frozen=True)
class SharedMemory:
    """Bytes of the memory that CPU and GPU share; `zram`: the part of swap that lies, compressed, in that memory."""

    total: int
    available: int
    swap: int = 0
    zram: int = 0


@dataclass(frozen=True)
class Jetson:
    """A Jetson.

    Attributes:
        model: the board, as its device tree says.
        sm: compute capability of the GPU times ten; None for a chip that is not known here.
        l4t: release of Jetson Linux: (36, 4, 3); empty when it is not known.
        power_mode: name of the power mode that is set.
        best_mode: id and name of the mode without limits, when there is one.
        clocks: of GPU and CPU, as far as they can be read.
        memory: None when it is not known.
    """

    model: str
    sm: int | None
    l4t: tuple[int, ...] = ()
    power_mode: str | None = None
    best_mode: tuple[int, str] | None = None
    clocks: tuple[Clock, ...] = ()
    memory: SharedMemory | None = None

    @property
    def jetpack(self) -> str | None:
        """The JetPack of this release of Jetson Linux, for example 6.2."""
        found = self._release()
        return None if found is None else found[0]

    @property
    def tensorrt(self) -> tuple[int, int] | None:
        """Major and minor version of the TensorRT that belongs to it."""
        found = self._release()
        return None if found is None else found[1]

    def _release(self) -> tuple[str, tuple[int, int]] | None:
        return next((rest for (first, *rest) in _RELEASES if self.l4t and self.l4t >= first), None)  # type: ignore[return-value]


def read_jetson(root: Path = Path("/"), ask: Ask | None = None) -> Jetson | None:
    """The Jetson that this machine is, or None when it is none.

    Args:
        root: where the system's files are; another folder for tests.
        ask: runs a command and returns what it prints, "" when it cannot be run; default: on this machine.
    """
    release, chip = _identity(root)
    if not _is_jetson(release, chip):
        return None
    mode, best = _power_mode(root, ask or _ask)
    found = re.search(r"nvidia,(tegra\d+)", chip)
    return Jetson(
        model=_text(root / "proc/device-tree/model").strip("\0 \n") or "Jetson",
        sm=_SMS.get(found[1]) if found else None,
        l4t=_l4t(release),
        power_mode=mode,
        best_mode=best,
        clocks=tuple(_clocks(root)),
        memory=_memory(root),
    )


def shared_memory(root: Path = Path("/")) -> SharedMemory | None:
    """The memory that CPU and GPU share, or None on a machine that is no Jetson; no command is asked."""
    return _memory(root) if _is_jetson(*_identity(root)) else None


def _identity(root: Path) -> tuple[str, str]:
    """What the system's release file and its device tree say."""
    return _text(root / "etc/nv_tegra_release"), _text(root / "proc/device-tree/compatible")


def _is_jetson(release: str, chip: str) -> bool:
    return "nvidia,tegra" in chip or release.startswith("# R")


def _l4t(release: str) -> tuple[int, ...]:
    """`# R36 (release), REVISION: 4.3, ...` -> (36, 4, 3)."""
    found = re.match(r"# R(\d{1,4}) \(release\), REVISION: (\d{1,4}(?:\.\d{1,4}){0,3})", release)
    return (int(found[1]), *map(int, found[2].split("."))) if found else ()


def _power_mode(root: Path, ask: Ask) -> tuple[str | None, tuple[int, str] | None]:
    """The mode that is set, and the one without limits: by its files, else by asking nvpmodel."""
    names = {
        int(each[1]): each[2]
        for each in re.finditer(
            r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([\w.-]{1,40})", _text(root / "etc/nvpmodel.conf")
        )
    }
    unlimited = sorted((name, number) for number, name in names.items() if name.startswith("MAXN"))
    best = unlimited[-1][::-1] if unlimited else None  # MAXN_SUPER goes before MAXN
    status = re.search(r"pmode:(\d{1,4})", _text(root / "var/lib/nvpmodel/status"))
    mode = names.get(int(status[1])) if status else None
    if mode is None:
        said = re.search(r"NV Power Mode:\s*([\w.-]{1,40})", ask(("nvpmodel", "-q")))
        mode = said[1] if said else None
    return mode, best


def _clocks(root: Path) -> Iterator[Clock]:
    """GPU clocks (17000000.gpu or .ga10b on Orin, gpu-gpc-0 on Thor), and the CPU clock with the most room to move."""
    for folder in sorted(_glob(root / "sys/class/devfreq", "*")):
        if re.fullmatch(r"\w+\.(gpu|ga10b|gv11b)|gpu-gpc-\d+", folder.name):
            yield from _clock("GPU", folder, ("cur_freq", "min_freq", "max_freq"), 1)
    names = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    policies = sorted(_glob(root / "sys/devices/system/cpu/cpufreq", "policy*"))
    cpus = [clock for folder in policies for clock in _clock("CPU", folder, names, 1000)]
    if cpus:
        yield max(cpus, key=lambda clock: clock.highest - clock.lowest)


def _clock(name: str, folder: Path, files: Sequence[str], unit: int) -> Iterator[Clock]:
    values = [_text(folder / each).strip() for each in files]
    if all(value.isascii() and value.isdigit() and len(value) < 15 for value in values):
        now, lowest, highest = (int(value) * unit for value in values)
        yield Clock(name, now, lowest, highest)


def _memory(root: Path) -> SharedMemory | None:
    sizes = {
        each[1]: int(each[2]) * 1024
        for each in re.finditer(r"^(\w+):\s+(\d{1,15}) kB$", _text(root / "proc/meminfo"), re.M)
    }
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        return None
    swaps = re.findall(r"^(/\S+)\s+\w+\s+(\d{1,15})\s", _text(root / "proc/swaps"), re.M)
    zram = sum(int(size) for device, size in swaps if "/zram" in device) * 1024
    return SharedMemory(sizes["MemTotal"], sizes["MemAvailable"], sizes.get("SwapTotal", 0), zram)


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []


def _text(path: Path) -> str:
    """The file's text; "" when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return ""


def _ask(command: Sequence[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, check=False)  # noqa: S603
        return done.stdout
    return ""
