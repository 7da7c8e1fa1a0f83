"""What `moiie doctor` says on a Jetson: what it is, whether its TensorRT fits, and what slows it down."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import distributions

from moiie_export.cli.environment import Finding
from moiie_runtime.jetson import Clock, Jetson, SharedMemory, read_jetson
from moiie_runtime.sizes import readable

OLDEST_TENSORRT = (10, 3)
_FREE = 0.6
"""Less of the memory free than this share is worth a warning."""


def jetson_findings(jetson: Jetson | None = None) -> Iterator[Finding]:
    """Findings about this machine, or `jetson`; none where there is no Jetson."""
    jetson = jetson or read_jetson()
    if jetson is None:
        return
    chip = "a chip that is not known here" if jetson.sm is None else f"SM {jetson.sm}"
    yield Finding("jetson", "info", f"{jetson.model}, {chip}, {_release(jetson)}")
    yield from _tensorrt(jetson)
    yield from _power(jetson)
    yield from (_clock(each) for each in jetson.clocks)
    if jetson.memory is not None:
        yield from _memory(jetson.memory)


def _release(jetson: Jetson) -> str:
    if not jetson.l4t:
        return "release of Jetson Linux not known (in a container, mount /etc/nv_tegra_release)"
    l4t = ".".join(map(str, jetson.l4t))
    return f"Jetson Linux {l4t}" + (f" (JetPack {jetson.jetpack})" if jetson.jetpack else "")


def _tensorrt(jetson: Jetson) -> Iterator[Finding]:
    """The system's TensorRT; one from pip is not made for this system."""
    expected = jetson.tensorrt
    foreign = sorted(name for name in _names() if name.startswith("tensorrt-cu"))
    if foreign:
        detail = f"{', '.join(foreign)} from pip hides the system's TensorRT and is not made for a Jetson"
        yield Finding("jetson tensorrt", "warn", detail, f"pip uninstall -y tensorrt {' '.join(foreign)}")
    elif expected is not None and expected < OLDEST_TENSORRT:
        yield Finding(
            "jetson tensorrt",
            "warn",
            f"JetPack {jetson.jetpack} has TensorRT {expected[0]}.{expected[1]}; engines need 10.3 or newer",
            "update to JetPack 6.2 or newer",
        )
    elif expected is not None:
        found = _names().get("tensorrt")
        own = f"{expected[0]}.{expected[1]}"
        if found is None:
            hint = "sudo apt install python3-libnvinfer, and make the environment with python3 -m venv --system-site-packages"
            yield Finding("jetson tensorrt", "warn", f"JetPack's {own} is not visible to this Python", hint)
        elif found.split(".")[:2] != own.split("."):
            yield Finding("jetson tensorrt", "info", f"{found}; JetPack {jetson.jetpack} comes with {own}")
        else:
            yield Finding("jetson tensorrt", "ok", f"{found}, JetPack's own")


def _names() -> dict[str, str]:
    found = ((str(each.metadata["Name"] or ""), each.version) for each in distributions())
    return {name.lower().replace("_", "-"): version for name, version in found}


def _power(jetson: Jetson) -> Iterator[Finding]:
    mode, best = jetson.power_mode, jetson.best_mode
    if mode is None:
        yield Finding("power mode", "info", "not known (in a container nvpmodel is out of reach)")
    elif mode.startswith("MAXN") and (best is None or mode == best[1]):
        yield Finding("power mode", "ok", mode)
    elif best is None:
        yield Finding("power mode", "info", f"{mode}; this board's configuration has no MAXN")
    else:
        detail = f"{mode} limits clocks and cores; {best[1]} does not"
        yield Finding("power mode", "warn", detail, f"sudo nvpmodel -m {best[0]}")


def _clock(clock: Clock) -> Finding:
    now, lowest, highest = (each / 1e6 for each in (clock.now, clock.lowest, clock.highest))
    name = f"{clock.name} clock"
    if clock.locked:
        return Finding(name, "ok", f"locked at {highest:.0f} MHz")
    detail = f"moves between {lowest:.0f} and {highest:.0f} MHz, now {now:.0f}: slow to rise for short steps"
    return Finding(name, "warn", detail, "sudo jetson_clocks (until the next start)")


def _memory(memory: SharedMemory) -> Iterator[Finding]:
    detail = f"{readable(memory.available)} of {readable(memory.total)} free, shared by CPU and GPU"
    if memory.available < _FREE * memory.total:
        hint = "close programs; without a desktop: sudo systemctl isolate multi-user.target"
        yield Finding("shared memory", "warn", detail, hint)
    else:
        yield Finding("shared memory", "ok", detail)
    if memory.zram:
        hint = "sudo systemctl disable nvzramconfig, add a swap file on the disk, and start again"
        detail = f"{readable(memory.zram)} of swap is zram, which takes the memory that engines need"
        yield Finding("swap", "warn", detail, hint)
    elif memory.swap:
        yield Finding("swap", "ok", f"{readable(memory.swap)}; for building engines only, weights in use do not swap")
    else:
        yield Finding("swap", "info", "none: building engines may end for want of memory on small boards")
