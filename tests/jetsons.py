"""Files as Jetsons have them, written into a folder; the wording is that of real ones, the numbers are examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_ORIN_GPU, _THOR_GPU = "sys/class/devfreq/17000000.gpu", "sys/class/devfreq/gpu-gpc-0"
_CPU = "sys/devices/system/cpu/cpufreq/policy0"

ORIN_NANO: Mapping[str, str] = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n",
    "var/lib/nvpmodel/status": "pmode:0001\n",
    f"{_ORIN_GPU}/cur_freq": "306000000\n",
    f"{_ORIN_GPU}/min_freq": "306000000\n",
    f"{_ORIN_GPU}/max_freq": "918000000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    f"{_CPU}/scaling_cur_freq": "729600\n",
    f"{_CPU}/scaling_min_freq": "729600\n",
    f"{_CPU}/scaling_max_freq": "1344000\n",
    "proc/meminfo": "MemTotal:        7802912 kB\nMemFree:          312000 kB\nMemAvailable:    3120000 kB\n"
    "SwapTotal:       3901440 kB\n",
    "proc/swaps": "Filename\tType\t\tSize\t\tUsed\t\tPriority\n/dev/zram0  partition\t1950720\t\t0\t\t5\n"
    "/dev/zram1  partition\t1950720\t\t0\t\t5\n",
}
"""Orin Nano 8 GB, JetPack 6.2, as it is delivered: 25 W, clocks that move, a desktop, zram."""

AGX_ORIN: Mapping[str, str] = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: x\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_50W >\n",
    "var/lib/nvpmodel/status": "pmode:0000\n",
    **{f"{_ORIN_GPU}/{name}_freq": "1300500000\n" for name in ("cur", "min", "max")},
    **{f"{_CPU}/scaling_{name}_freq": "2201600\n" for name in ("cur", "min", "max")},
    "proc/meminfo": "MemTotal:       64337636 kB\nMemAvailable:   60000000 kB\nSwapTotal:      16777212 kB\n",
    "proc/swaps": "Filename\tType\t\tSize\t\tUsed\t\tPriority\n/16GB.swap  file\t16777212\t0\t\t-2\n",
}
"""AGX Orin 64 GB, JetPack 6.2.1, MAXN, `jetson_clocks`, no desktop, a swap file."""

THOR: Mapping[str, str] = {
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Aug 22 00:55:42 UTC 2025\n# KERNEL_VARIANT: oot\nINSTALL_TYPE=\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    **{f"{_THOR_GPU}/{name}_freq": f"{value}\n" for name, value in (("cur", 315000000), ("min", 315000000))},
    f"{_THOR_GPU}/max_freq": "1575000000\n",
    "proc/meminfo": "MemTotal:      128819456 kB\nMemAvailable:  120000000 kB\nSwapTotal:             0 kB\n",
    "proc/swaps": "Filename\tType\t\tSize\t\tUsed\t\tPriority\n",
}
"""AGX Thor, JetPack 7.0; its power mode is only told by the command."""

PC: Mapping[str, str] = {"proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable: 30000000 kB\n"}
RASPBERRY: Mapping[str, str] = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
}


def system(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """`folder` as the root of a system with these files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
